"""Recipes as YAML and as typed settings by dotted name. The only reader and writer of `recipe.yaml`."""

import dataclasses
import difflib
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from vitreg_hub.environment import public_text
from vitreg_hub.errors import RecipeError
from vitreg_hub.files import RECIPE_FILE, write_file
from vitreg_hub.training.recipes.settings import Augment, Recipe, to_dict
from vitreg_hub.training.tasks import TaskSettings

KIND = "kind"
"""Key that tells which dataclass `task` and `augment` are."""

KINDS: Mapping[str, Mapping[str, type]] = {
    part: {kind.__name__: kind for kind in get_args(union)}
    for part, union in (("task", TaskSettings), ("augment", Augment))
}
MAY_CHANGE = (
    *("name", "license"),
    *(f"scale.{how}" for how in ("precision", "sharding", "checkpointing", "compile")),
    "watch.",
    "data.num_workers",
)
"""Settings, or what they begin with, that may differ when a run goes on: they change nothing that is learnt."""

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting that a user can give.

    Attributes:
        name: Dotted, such as ``optim.lr``.
        type: What it takes.
        default: Its value, plain; MISSING if it must be given.
        text: What it means.
        inner: The names below it, for a group that may also be null.
    """

    name: str
    type: Any
    default: Any
    text: str
    inner: tuple["Setting", ...] = ()


def recipe_to_yaml(recipe: Recipe) -> str:
    """All settings, nested, with the kinds of task and augment."""
    return yaml.safe_dump(with_kinds(recipe), sort_keys=False)


def recipe_from_yaml(text: str, *, called: str = RECIPE_FILE) -> Recipe:
    """The recipe that `recipe_to_yaml` wrote; settings that it does not know take their defaults.

    Args:
        text: YAML.
        called: Name of the file, for messages.

    Raises:
        RecipeError: It is no recipe.
    """
    given = _mapping(text, called)
    kinds = {}
    for part, known in KINDS.items():
        kind = given[part].get(KIND) if isinstance(given.get(part), dict) else None
        if kind not in known:
            raise RecipeError(f"{called} is no whole recipe: its {part}.{KIND} must be one of {', '.join(known)}.")
        kinds[part] = known[kind]
    settings = tuple(_settings(Recipe, None, kinds=kinds))
    given = _without_kinds(given)
    names = set(_dotted(given))
    if lacking := [s.name for s in settings if s.default is MISSING and s.name not in names]:
        raise RecipeError(f"{called} is no whole recipe: it lacks {', '.join(lacking)}.")
    return _build(Recipe, _parsed(settings, given, text, called=called), kinds)


def updated(recipe: Recipe, text: str, *, called: str) -> Recipe:
    """A recipe with some settings taken from YAML of the same nesting.

    Args:
        recipe: Gives all other settings.
        text: YAML.
        called: Name of the file, for messages.

    Raises:
        RecipeError: A setting is unknown, of the wrong type, or contradicts another.
    """
    given, kinds = _mapping(text, called), _kinds(recipe)
    for part, kind in kinds.items():
        told = given[part].get(KIND, kind.__name__) if isinstance(given.get(part), dict) else kind.__name__
        if told != kind.__name__:
            raise RecipeError(
                f"{called} has a {part} of the kind {told}, but that of recipe {recipe.name} is {kind.__name__}: "
                f"take a recipe of the same kind."
            )
    return _build(Recipe, _parsed(settings_of(recipe), _without_kinds(given), text, called=called), kinds)


def settings_of(recipe: Recipe) -> tuple[Setting, ...]:
    """Every setting of a recipe with its value as default."""
    return tuple(_settings(Recipe, recipe, kinds=_kinds(recipe)))


def build_recipe(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe of the same kinds with other values, nested.

    Raises:
        RecipeError: They contradict each other.
    """
    return _build(Recipe, values, _kinds(recipe))


def public_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings as `with_kinds` gives them, their texts as others may see them."""
    return _public(with_kinds(recipe))


def write_recipe(recipe: Recipe, folder: Path, *, public: bool = False) -> Path:
    """Write `recipe.yaml` into a folder, in the place of an old one.

    Args:
        recipe: The run.
        folder: The run's, or that of a bundle which may be published.
        public: Whether it tells `public_settings`, with which no run can be compared.

    Raises:
        BundleError: It cannot be written.
    """
    text = yaml.safe_dump(public_settings(recipe), sort_keys=False) if public else recipe_to_yaml(recipe)
    return write_file(Path(folder, RECIPE_FILE), lambda file: file.write_text(text, encoding="utf-8"), replace=True)


def require_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with a run under settings that would have made another one.

    Args:
        recipe: What is asked for.
        folder: Of the run, with its `recipe.yaml`.

    Raises:
        RecipeError: A setting that matters differs, or the file cannot be read.
    """
    file = Path(folder, RECIPE_FILE)
    before = recipe_from_yaml(read_text(file), called=str(file))
    old, new = (_flat(with_kinds(r)) for r in (before, recipe))
    different = [name for name in {**old, **new} if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)]
    if different:
        name = min(different, key=lambda name: not name.endswith(f".{KIND}"))  # another kind explains the rest
        others = f" and {len(different) - 1} more settings differ" if different[1:] else ""
        raise RecipeError(
            f"the run in {folder} has {name} {old.get(name)}, not {new.get(name)}{others}: give the settings of "
            f"{file}, or another folder for another run."
        )


def read_text(file: Path) -> str:
    """Text of a file.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}.") from error


def require_known(
    names: Iterable[str], settings: Iterable[Setting], *, called: str, besides: Iterable[str] = ()
) -> None:
    """Refuse names of settings that do not exist.

    Args:
        names: Dotted.
        settings: All there are.
        called: Who has them, for the message.
        besides: Other names that could have been meant.

    Raises:
        RecipeError: One is unknown; the message names the nearest.
    """
    known = [s.name for setting in settings for s in (setting, *setting.inner)]
    candidates = [*known, *besides]
    ends = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    for name in names:
        if name not in candidates:
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
            near = near or [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)]
            hint = f"did you mean {near[0]}?" if near else "`vitreg train RECIPE --help` shows all."
            raise RecipeError(f"{called} has no setting {name}: {hint}")


def add_settings(parser: Any, settings: Iterable[Setting]) -> None:
    """Add settings to a jsonargparse parser, or to a group of one."""
    for setting in settings:
        required = {"required": True} if setting.default is MISSING else {"default": setting.default}
        parser.add_argument(f"--{setting.name}", type=setting.type, help=setting.text.replace("%", "%%"), **required)


def type_error(error: ArgumentError, settings: Iterable[Setting], *, called: str) -> RecipeError:
    """What jsonargparse says of a value, in one sentence."""
    text = str(error)
    path = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    known = {s.name: s for setting in settings for s in (setting, *setting.inner)}
    got = re.search(r"(?:Got|Given) value: (.*)", text)
    if path not in known or got is None:
        return RecipeError(f"{called}: {' '.join(text.split())}.")
    return RecipeError(f"{called}: {path} takes {words(known[path].type)}, not {got[1]!r}.")


def words(kind: Any) -> str:
    """A type in words."""
    inner = get_args(kind)
    if is_dataclass(kind):
        return "its own settings"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if get_origin(kind) is tuple:
        return f"a list [{', '.join('...' if i is Ellipsis else words(i) for i in inner)}]"
    return PLAIN[kind] if kind in PLAIN else " or ".join(words(i) for i in inner)


def _settings(kind: type, values: Any, *, kinds: Mapping[str, type], prefix: str = "") -> Iterator[Setting]:
    """Yield the settings of a dataclass and of those in it; `values` is one, or None for its defaults."""
    texts = _attribute_texts(kind)
    for field in fields(kind):
        hint = _hint(kind, field.name, kinds)
        name = prefix + field.name
        if values is not None:
            value = getattr(values, field.name)
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(hint):
            yield from _settings(hint, None if value is MISSING else value, kinds={}, prefix=f"{name}.")
        else:
            group = _dataclass_in(hint)
            inner = tuple(_settings(group, value, kinds={}, prefix=f"{name}.")) if group else ()
            plain = dataclasses.asdict(value) if is_dataclass(value) else value
            yield Setting(name=name, type=hint, default=plain, text=texts.get(field.name, ""), inner=inner)


def _hint(kind: type, name: str, kinds: Mapping[str, type]) -> Any:
    return kinds[name] if kind is Recipe and name in kinds else get_type_hints(kind)[name]


def _dataclass_in(hint: Any) -> type | None:
    return next((member for member in (hint, *get_args(hint)) if is_dataclass(member)), None)


def _attribute_texts(kind: type) -> dict[str, str]:
    """What a dataclass's docstring says of its attributes."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _kinds(recipe: Recipe) -> dict[str, type]:
    return {part: type(getattr(recipe, part)) for part in KINDS}


def with_kinds(recipe: Recipe) -> dict[str, Any]:
    """All settings as JSON-safe nested dictionaries, from which `recipe_from_yaml` makes an equal recipe."""
    plain = to_dict(recipe)
    return plain | {part: {KIND: kind.__name__, **plain[part]} for part, kind in _kinds(recipe).items()}


def _public(value: Any) -> Any:
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    return [_public(inner) for inner in value] if isinstance(value, list) else value


def _without_kinds(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        part: {key: value for key, value in values.items() if key != KIND}
        if part in KINDS and isinstance(values, dict)
        else values
        for part, values in given.items()
    }


def _build(kind: type, values: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    """An instance of a dataclass from nested values of the right types."""
    arguments = {}
    for field in fields(kind):
        if field.name in values:
            value, group = values[field.name], _dataclass_in(_hint(kind, field.name, kinds))
            arguments[field.name] = value if group is None or value is None else _build(group, value, {})
    return kind(**arguments)


def _mapping(text: str, called: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{called} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise RecipeError(
            f"{called} holds no settings: give them nested, as `vitreg train RECIPE --print_config` does."
        )
    return given


def _dotted(given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of nested values, those of groups included."""
    for key, value in given.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _groups(names: Iterable[str]) -> set[str]:
    """What dotted names begin with."""
    return {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}


def _parsed(settings: tuple[Setting, ...], given: Mapping[str, Any], text: str, *, called: str) -> dict[str, Any]:
    """Values of all settings, of the right types."""
    kinds = {s.name: s.type for s in settings}
    groups = _groups(kinds)
    require_known(_dotted(given), settings, called=called, besides=groups)
    for name, value in _flat(given).items():  # jsonargparse takes null, and anything in place of a group
        if name in groups and name not in kinds:
            raise RecipeError(
                f"{called}: {name} takes its own settings, not {'null' if value is None else repr(value)}."
            )
        if value is None and name in kinds and NoneType not in get_args(kinds[name]):
            raise RecipeError(f"{called}: {name} takes {words(kinds[name])}, not null.")
    parser = ArgumentParser(exit_on_error=False)
    add_settings(parser, settings)
    for part in KINDS:  # stands in files, and is known before they are parsed
        parser.add_argument(f"--{part}.{KIND}", type=str)
    try:
        return parser.parse_string(text).as_dict()
    except ArgumentError as error:
        raise type_error(error, settings, called=called) from error
