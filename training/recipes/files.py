"""Recipes as YAML and as typed settings by dotted name. The only reader and writer of `recipe.yaml`."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter

from vitreg_hub.bounded import PlainLoader
from vitreg_hub.environment import public_text
from vitreg_hub.errors import RecipeError
from vitreg_hub.files import RECIPE_FILE, whole_file
from vitreg_hub.training.recipes.settings import Augment, Recipe, flat, to_dict
from vitreg_hub.training.tasks import TASKS
from vitreg_hub.typed import MOST_LETTERS, shown

T = TypeVar("T")

MOST_TEXT = 50_000
"""Letters of a file of settings, ten times what any needs: reading them takes seconds."""
KIND = "kind"
"""Key that says which dataclass `task` and `augment` are."""

KINDS: Mapping[str, Mapping[str, type]] = {
    "task": {kind.__name__: kind for kind in TASKS},
    "augment": {kind.__name__: kind for kind in get_args(Augment)},
}
MAY_CHANGE = (
    "name",
    "license",
    "scale.precision",
    "scale.sharding",
    "scale.checkpointing",
    "scale.compile",
    "watch.",
    "data.num_workers",
)
"""Beginnings of the names of settings that may differ when a run goes on, because they do not change what is learnt."""

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def recipe_to_yaml(recipe: Recipe) -> str:
    """All settings, nested, with the kinds of task and augment."""
    return yaml.safe_dump(with_kinds(recipe), sort_keys=False)


def recipe_from_yaml(text: str, *, called: str = RECIPE_FILE) -> Recipe:
    """Read what `recipe_to_yaml` wrote; settings that are missing take their defaults, if they have one.

    Raises:
        RecipeError: It is not a recipe.
    """
    given, kinds = _mapping(text, called), {}
    for part, known in KINDS.items():
        kind = given[part].pop(KIND, "") if isinstance(given.get(part), dict) else ""
        if kind not in known:
            raise RecipeError(
                f"{called} is not a complete recipe: its {part}.{KIND} must be one of {', '.join(known)}."
            )
        kinds[part] = known[kind]
    _require_known(flat(given), _types(kinds), called=called)
    return _made(Recipe, given, kinds, called=called)


def named_in(text: str, *, called: str) -> str:
    """The name of the recipe that YAML holds, or changes.

    Raises:
        RecipeError: It has none.
    """
    name = _mapping(text, called).get("name")
    if not isinstance(name, str):
        raise RecipeError(f"{called} does not say its recipe: add its name, or put the recipe's before --config.")
    return name


def updated(recipe: Recipe, text: str, *, called: str) -> Recipe:
    """A recipe with some settings taken from YAML of the same nesting; `called` names it in messages.

    Raises:
        RecipeError: A setting is unknown, of the wrong type, or contradicts another.
    """
    given, kinds = _mapping(text, called), _kinds(recipe)
    for part, kind in kinds.items():
        other = given[part].pop(KIND, kind.__name__) if isinstance(given.get(part), dict) else kind.__name__
        if other != kind.__name__:
            raise RecipeError(
                f"{called} has a {part} of the kind {other}, but that of recipe {recipe.name} is {kind.__name__}: take "
                "a recipe of the same kind."
            )
    _require_known(flat(given), _types(kinds), called=called)
    return _made(Recipe, _merged(to_dict(recipe), given), kinds, called=called)


def changed(recipe: Recipe, texts: Mapping[str, str], *, called: str, besides: Iterable[str] = ()) -> Recipe:
    """A recipe with some settings given as text by dotted names, as on a command line.

    Messages say what has the settings (`called`), and suggest the nearest name, also one of `besides`.

    Raises:
        RecipeError: A setting is unknown, of the wrong type, or contradicts another.
    """
    if not texts:
        return recipe
    kinds, values = _kinds(recipe), to_dict(recipe)
    types = _types(kinds)
    _require_known(texts, types, called=called, besides=besides)
    for name, text in texts.items():
        value = _value(text, types[name])
        for part in reversed(name.split(".")):
            value = {part: value}
        values = _merged(values, value)
    return _made(Recipe, values, kinds, called=called)


def setting_types(recipe: Recipe) -> dict[str, Any]:
    """The type of every setting, and of every group of settings, by its dotted name."""
    return _types(_kinds(recipe))


def public_settings(recipe: Recipe) -> dict[str, Any]:
    """All settings as `with_kinds` gives them, without private paths in their texts."""
    return _public(with_kinds(recipe))


def write_recipe(recipe: Recipe, folder: Path, *, public: bool = False) -> Path:
    """Write `recipe.yaml` into a folder, replacing an old one.

    With `public` it holds `public_settings`, which are not enough to go on with a run.

    Raises:
        BundleError: It cannot be written.
    """
    text = yaml.safe_dump(public_settings(recipe), sort_keys=False) if public else recipe_to_yaml(recipe)
    target = Path(folder, RECIPE_FILE)
    with whole_file(target, replace=True) as file:
        file.write_text(text, encoding="utf-8")
    return target


def require_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with the run in a folder under settings that would change what it learns, except more epochs.

    Raises:
        RecipeError: A setting that matters differs, or the file cannot be read.
    """
    file = Path(folder, RECIPE_FILE)
    before = recipe_from_yaml(read_text(file), called=str(file))
    old, new = (flat(with_kinds(r)) for r in (before, recipe))
    different = [name for name in {**old, **new} if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)]
    if recipe.epochs > before.epochs:
        different.remove("epochs")
    if different:
        kinds = [name for name in different if name.endswith(f".{KIND}")]  # another kind explains the rest
        name = (kinds or different)[0]
        others = f" and {len(different) - 1} more settings differ" if different[1:] else ""
        raise RecipeError(
            f"the run in {folder} has {name} {old.get(name)}, not {new.get(name)}{others}: give the settings of "
            f"{file}, or another folder for another run."
        )


def read_text(file: Path) -> str:
    """Read the text of a file, as far as a file of settings may go.

    Raises:
        RecipeError: It cannot be read.
    """
    try:
        with Path(file).open(encoding="utf-8") as opened:
            return opened.read(MOST_TEXT + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not text'}.") from error


def _require_known(names: Iterable[str], types: Mapping[str, Any], *, called: str, besides: Iterable[str] = ()) -> None:
    """Refuse names of settings that do not exist."""
    candidates = [*types, *besides]
    ends = {name.rpartition(".")[2]: name for name in reversed(candidates)}
    for name in names:
        if name not in types:
            near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
            if not near:
                near = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)]
            hint = f"did you mean {near[0]}?" if near else "`vitreg train RECIPE --help` shows all."
            raise RecipeError(f"{called} has no setting {name[:MOST_LETTERS]}: {hint}")


def _types(kinds: Mapping[str, type], group: type = Recipe, prefix: str = "") -> dict[str, Any]:
    types: dict[str, Any] = {}
    for name, hint in _hints(group, kinds).items():
        types[f"{prefix}{name}"] = hint
        if inner := _group(hint):
            types |= _types({}, inner, f"{prefix}{name}.")
    return types


def _hints(group: type, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The types of a dataclass's fields in their order, with `kinds` in place of what those are kinds of."""
    hints = {**get_type_hints(group), **kinds}
    return {field.name: hints[field.name] for field in fields(group)}


def _group(hint: Any) -> type | None:
    """The dataclass in a type, which may also be null."""
    return next((inner for inner in (hint, *get_args(hint)) if isinstance(inner, type) and is_dataclass(inner)), None)


def _made(group: type[T], values: Mapping[str, Any], kinds: Mapping[str, type], *, called: str, prefix: str = "") -> T:
    """Make a dataclass of nested values, whose names are known; `prefix` is its place in the recipe."""
    hints, made = _hints(group, kinds), {}
    needed = [
        field.name
        for field in fields(cast(Any, group))
        if field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [f"{prefix}{name}" for name in needed if name not in values]:
        raise RecipeError(f"{called} is not a complete recipe: add {', '.join(missing)}.")
    for name, value in values.items():
        if name not in hints:  # a dotted name
            raise RecipeError(
                f"{called} has {prefix}{name}: give settings nested, as `vitreg train RECIPE --print_config` does."
            )
        hint, inner = hints[name], _group(hints[name])
        if inner and isinstance(value, dict):
            made[name] = _made(inner, value, {}, called=called, prefix=f"{prefix}{name}.")
            continue
        try:
            made[name] = _typed(hint, value)
        except ValueError as error:
            quoted = "null" if value is None else shown(value if is_dataclass(hint) else str(value))
            raise RecipeError(f"{called}: {prefix}{name} takes {_words(hint)}, not {quoted}.") from error
    return group(**made)


def _typed(hint: Any, value: Any) -> Any:
    """A value of a type; raises a ValueError if it is of another."""
    if isinstance(value, str) and get_args(hint) == (str, Ellipsis):
        value = [value]
    if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
        raise ValueError("pydantic would take it for 0 or 1")
    return TypeAdapter(hint).validate_python(value)


def _value(text: str, hint: Any) -> Any:
    """A value from a command line; where text is wanted, it is taken as written."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if text == "null" and NoneType in kinds:
        return None
    listed = any(get_origin(kind) is tuple for kind in kinds) and not text.startswith(("[", "- "))
    if not listed and (str in kinds or get_origin(hint) is Literal):
        return text
    try:
        return yaml.load(f"[{text}]" if listed else text, PlainLoader)
    except yaml.YAMLError:  # such as a text with braces
        return [text] if listed else text


def _merged(values: Any, given: Any) -> Any:
    """Nested values, with the given ones replacing others."""
    if not isinstance(given, dict):
        return given
    old = values if isinstance(values, dict) else {}
    return old | {key: _merged(old.get(key), value) for key, value in given.items()}


def _words(kind: Any) -> str:
    """A type in words."""
    inner = get_args(kind)
    if is_dataclass(kind):
        return "its own settings"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if get_origin(kind) is tuple:
        return f"a list [{', '.join('...' if i is Ellipsis else _words(i) for i in inner)}]"
    return PLAIN[kind] if kind in PLAIN else " or ".join(_words(i) for i in inner)


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


def _mapping(text: str, called: str) -> dict[str, Any]:
    if len(text) > MOST_TEXT:
        raise RecipeError(f"{called} has more than {MOST_TEXT:,} letters, so it holds no settings of a run.")
    try:
        given = yaml.load(text, PlainLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{called} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise RecipeError(
            f"{called} holds no settings: give them nested, as `vitreg train RECIPE --print_config` does."
        )
    return given
