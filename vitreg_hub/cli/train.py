"""`vitreg train`, and `accelerate launch -m vitreg_hub.training`: a recipe, what changes in it, where it goes."""

import argparse
import difflib
import inspect
from argparse import ArgumentError
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from jsonargparse import ArgumentParser

from vitreg_hub.arch import get_arch
from vitreg_hub.cli.arguments import OptionalN, arguments, summary, texts
from vitreg_hub.console import HelpFormatter, hide_loading
from vitreg_hub.environment import duration
from vitreg_hub.errors import RecipeError
from vitreg_hub.training.recipes.files import KINDS, changed, read_text, recipe_to_yaml, setting_types, updated
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import Recipe, require_start
from vitreg_hub.training.run.folders import BEST

USAGE = "vitreg train RECIPE [--registers N] [--config FILE.yaml] [--optim.lr 5e-4 ...] --out DIR"
EXAMPLES = """examples:
  vitreg train supervised_digits --out digits                    from scratch on real digits
  vitreg train supervised_digits --out digits                    again: goes on where it was stopped
  vitreg train supervised_digits --registers 0 --out plain       the same without registers
  vitreg train dinov2_digits --task.dino_head.prototypes 512 --augment.num_local 2 --out ssl
  vitreg train deit3_small --data.train photos/train --data.test photos/val --out run --dry-run    time and memory
  vitreg train deit3_base_finetune_384 --model.start run/model --out fine --push org/name
  vitreg train dinov2_vitl14 --print_config > mine.yaml          all settings, to be changed
  vitreg train dinov2_vitl14 --config mine.yaml --out ssl
  accelerate launch --num_processes 8 -m vitreg_hub.training dinov2_vitl14 --out ssl
"""
SCORE_PREFIX = "eval/"
"""Begins the names of scores among all that an evaluation measures."""
HELP, PRINT = ("-h", "--help"), "--print_config"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `vitreg train` takes beside the settings of a recipe.

    Attributes:
        registers: register tokens: 0, 1, 2, 4, 8 or 16; a recipe's own are 4
        config: YAML of settings, such as another run's recipe.yaml; options come after
        out: folder of the run: checkpoints, metrics, recipe.yaml, curves.png, best, model
        resume: auto goes on with a run in DIR, never does not; or a checkpoint's folder
        dry_run: two steps, then memory and time of the whole; nothing is written
        push: publish the last model on the branch main, and the best one on best
        push_every: publish at each checkpoint, in the background, or last
        private: of --push: only its owner sees a new repository
    """

    registers: OptionalN = None
    config: Annotated[list[str] | None, "FILE"] = None
    out: Annotated[str | None, "DIR"] = None
    resume: str = "auto"
    dry_run: bool = False
    push: Annotated[str | None, "ORG/NAME"] = None
    push_every: Literal["save", "end"] = "end"
    private: bool = False


def run(args: Sequence[str]) -> None:
    """Train a Vision Transformer with registers by a recipe.

    Args:
        args: The name of the recipe, what changes in it, and the options of the run.

    Raises:
        VitregError: A mistake in the arguments, or what `train` raises.
    """
    if not args:
        raise RecipeError(f"give a recipe: {USAGE}; `vitreg train --help` lists them.")
    name, *rest = args
    if name in HELP:
        print(overview())
        return
    if name.startswith("-"):
        raise RecipeError(f"the recipe comes first, not {name}: {USAGE}")
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"there is no recipe {name}: {hint}`vitreg train --help` lists all {len(RECIPES)}.")
    options, changes, wants = _read(rest)
    recipe = RECIPES[name]() if options.registers is None else RECIPES[name](registers=options.registers)
    for file in options.config or ():
        recipe = updated(recipe, read_text(Path(file)), called=file)
    if wants.help:
        print(_help(name, recipe))
        return
    besides = (PRINT.removeprefix("--"), *(names[0].removeprefix("--") for names, _ in arguments(Options)))
    recipe = changed(recipe, changes, called=f"recipe {name}", besides=besides)
    _require_consistent(recipe, options.registers)
    if wants.print_config:
        print(recipe_to_yaml(recipe), end="")
        return
    require_start(recipe)
    if options.dry_run:
        _dry_run(recipe)
        return
    if options.out is None:
        raise RecipeError(f"give --out, the folder of the run: vitreg train {name} --out DIR")
    _train(recipe, Path(options.out), options)


def overview() -> str:
    """The text of `vitreg train --help`: the recipes and examples."""
    width = max(map(len, RECIPES))
    lines = [f"  {name.ljust(width)}  {summary(recipe)}" for name, recipe in RECIPES.items()]
    return "\n".join(
        (
            f"usage: {USAGE}\n\n{summary(run)}\n\nrecipes:",
            *lines,
            f"\n{EXAMPLES}",
            "DIR/model is the last model, DIR/best that of the best evaluation (watch.eval_every). --push publishes",
            "both with recipe and curves, as hf-hub:org/name and hf-hub:org/name@best, and needs their --license.",
            "`vitreg train RECIPE --help` shows every setting of a recipe with its value and meaning.",
        )
    )


def _read(args: Sequence[str]) -> tuple[Options, dict[str, str], argparse.Namespace]:
    """The options of the run, the settings that change as they are written, and what else is wanted."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names, how in arguments(Options):
        parser.add_argument(*names, **how)
    parser.add_argument(*HELP, action="store_true")
    parser.add_argument(PRINT, action="store_true")
    try:
        given, rest = parser.parse_known_args(args)
    except ArgumentError as error:
        raise RecipeError(f"{error}.") from error
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    changes, words = {}, iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise RecipeError(f"unrecognized arguments: {word}.")
        name, equals, value = word.removeprefix("--").partition("=")
        changes[name] = value if equals else next(words, "--")
        if changes[name].startswith("--") and not equals:
            raise RecipeError(f"argument --{name}: expected one argument.")
    return options, changes, given


def _help(name: str, recipe: Recipe) -> str:
    """The text of `vitreg train RECIPE --help`: every setting with its value."""
    parser = ArgumentParser(
        prog=f"vitreg train {name}",
        usage=USAGE.replace("RECIPE", name),
        description=inspect.getdoc(RECIPES[name]),
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("run")
    for names, how in arguments(Options):
        group.add_argument(*names, **how)
    group.add_argument(PRINT, action="store_true", help="print all settings as YAML for --config, and stop")
    types = setting_types(recipe)
    parts = [field.name for field in fields(recipe) if is_dataclass(types[field.name])]
    _add_settings(parser.add_argument_group("recipe"), recipe, types, skip=parts)
    for part in parts:
        kind = f" ({types[part].__name__})" if part in KINDS else ""
        group = parser.add_argument_group(f"{part}{kind}: {summary(types[part]).rstrip('.')}")
        _add_settings(group, getattr(recipe, part), types, prefix=f"{part}.")
    return parser.format_help()


def _add_settings(
    group: Any, values: Any, types: Mapping[str, Any], *, prefix: str = "", skip: Collection[str] = ()
) -> None:
    """Show the settings of a dataclass, and of those in it, with their values."""
    meanings = texts(type(values))
    for field in fields(values):
        name, value = f"{prefix}{field.name}", getattr(values, field.name)
        if name in skip:
            continue
        if is_dataclass(types[name]):
            _add_settings(group, value, types, prefix=f"{name}.")
        else:
            plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            group.add_argument(f"--{name}", type=types[name], default=plain, help=meanings[field.name])


def _require_consistent(recipe: Recipe, registers: int | None) -> None:
    arch = get_arch(recipe.model.arch)
    if registers is not None and arch.num_registers != registers:
        raise RecipeError(
            f"--registers {registers} contradicts model.arch {arch.name}, which has {arch.num_registers}: "
            "give one of them."
        )


def _dry_run(recipe: Recipe) -> None:
    from accelerate import PartialState

    from vitreg_hub.training.loop import dry_run

    hide_loading()
    result = dry_run(recipe)
    if not PartialState().is_main_process:
        return
    print(f"steps       {result.steps}")
    print(f"images      {result.images_per_second:.4g} a second, over all processes")
    print(f"time        {duration(result.eta_seconds)}, without evaluations")
    print(f"memory      {result.memory_gib:.2f} GiB at most, of one process")
    print(f"parameters  {result.parameters / 1e6:.1f} M are trained")


def _train(recipe: Recipe, out: Path, options: Options) -> None:
    from accelerate import PartialState

    from vitreg_hub.training.loop import train

    hide_loading()
    how = {name: getattr(options, name) for name in ("resume", "push", "push_every", "private")}
    result = train(recipe, out, **how)
    if not PartialState().is_main_process:
        return
    for score, value in result.metrics.items():
        if score.startswith(SCORE_PREFIX):
            print(f"{score.removeprefix(SCORE_PREFIX).ljust(24)} {value:.4g}")
    stopped = f"stopped  after step {result.step} of {result.total_steps}; the same command goes on"
    print(f"model    {result.model}" if result.model else stopped)
    if result.model and (best := result.best):
        print(f"best     {result.folder / BEST}, {best.name} {best.score:.4g} after step {best.step}")
    for branch, commit in result.commits.items():
        print(f"pushed   {commit} ({branch})")
    if result.model:
        print(f"""
next:
  vitreg verify {result.model}
  vitreg analyze {result.model}
  vitreg push {result.model} your-name/{recipe.name}""")
