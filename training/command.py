"""`vitreg train`, and `accelerate launch -m vitreg_hub.training`: a recipe, what changes in it, where it goes."""

import argparse
import difflib
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jsonargparse import ArgumentParser

from vitreg_hub.arch import get_arch
from vitreg_hub.console import HelpFormatter
from vitreg_hub.environment import duration
from vitreg_hub.errors import RecipeError
from vitreg_hub.training.recipes.files import (
    KINDS,
    add_settings,
    build_recipe,
    read_text,
    recipe_to_yaml,
    require_known,
    settings_of,
    type_error,
    updated,
)
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import Recipe, require_start
from vitreg_hub.training.run.folders import BEST

SUMMARY = "Train a Vision Transformer with registers by a recipe."
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
"""What the names of scores begin with, among all that an evaluation measures."""
HELP, PRINT = ("-h", "--help"), "--print_config"

RUN: list[tuple[str, dict[str, Any]]] = [
    ("--registers", {"type": int, "default": 4, "metavar": "N", "help": "register tokens: 0, 1, 2, 4, 8 or 16"}),
    (
        "--config",
        {"metavar": "FILE", "help": "YAML of settings, such as another run's recipe.yaml; options come after"},
    ),
    (
        "--out",
        {"metavar": "DIR", "help": "folder of the run: checkpoints, metrics, recipe.yaml, curves.png, best, model"},
    ),
    (
        "--resume",
        {"default": "auto", "help": "auto goes on with a run in DIR, never does not; or a checkpoint's folder"},
    ),
    ("--dry-run", {"action": "store_true", "help": "two steps, then memory and time of the whole; nothing is written"}),
    (
        "--push",
        {"metavar": "ORG/NAME", "help": "publish the last model on the branch main, and the best one on best"},
    ),
    (
        "--push-every",
        {
            "choices": ["save", "end"],
            "default": "end",
            "help": "publish at each checkpoint, in the background, or last",
        },
    ),
    ("--private", {"action": "store_true", "help": "of --push: a new repository can be seen by its owner alone"}),
    (PRINT, {"action": "store_true", "help": "print all settings as YAML for --config, and stop"}),
]


def run_command(args: Sequence[str]) -> None:
    """Run `vitreg train` with the arguments after that.

    Raises:
        VitregError: A mistake in the arguments, or what `train` raises.
    """
    if not args:
        raise RecipeError(f"give a recipe: {USAGE}; `vitreg train --help` lists them.")
    if args[0] in HELP:
        print(overview())
        return
    name, *rest = args
    if name.startswith("-"):
        raise RecipeError(f"the recipe comes first, not {name}: {USAGE}")
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"there is no recipe {name}: {hint}`vitreg train --help` lists all {len(RECIPES)}.")
    early = _early(rest)
    recipe = RECIPES[name](**({} if early.registers is None else {"registers": early.registers}))
    for file in early.config:
        recipe = updated(recipe, read_text(file), called=file)
    if early.help:
        print(_parser(name, recipe).format_help())
        return
    recipe, given = _parse(name, recipe, rest)
    _require_consistent(recipe, early.registers)
    if early.print_config:
        print(recipe_to_yaml(recipe), end="")
        return
    require_start(recipe)
    if given["dry_run"]:
        _dry_run(recipe)
        return
    if given["out"] is None:
        raise RecipeError(f"give --out, the folder of the run: vitreg train {name} --out DIR")
    _train(recipe, given)


def overview() -> str:
    """What `vitreg train --help` says: the recipes and examples."""
    width = max(map(len, RECIPES))
    lines = [f"  {name.ljust(width)}  {_first_line(recipe.__doc__)}" for name, recipe in RECIPES.items()]
    return "\n".join(
        (
            f"usage: {USAGE}\n\n{SUMMARY}\n\nrecipes:",
            *lines,
            f"\n{EXAMPLES}",
            "DIR/model is the last model, DIR/best that of the best evaluation (watch.eval_every). --push publishes",
            "both with recipe and curves, as hf-hub:org/name and hf-hub:org/name@best, and must know their --license.",
            "`vitreg train RECIPE --help` shows every setting of a recipe with its value and meaning.",
        )
    )


def _early(args: Sequence[str]) -> argparse.Namespace:
    """What must be known before the settings' defaults are: registers, files, and whether help is wanted."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--registers", type=int)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument(PRINT, action="store_true")
    parser.add_argument(*HELP, action="store_true")
    try:
        return parser.parse_known_args(args)[0]
    except ArgumentError as error:
        raise RecipeError(f"{error}.") from error


def _parser(name: str, recipe: Recipe) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"vitreg train {name}",
        usage=USAGE.replace("RECIPE", name),
        description=f"{RECIPES[name].__doc__}".replace("\n    ", "\n").strip(),
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    run = parser.add_argument_group("run")
    for option, settings in RUN:
        run.add_argument(option, **settings)
    settings = settings_of(recipe)
    add_settings(parser.add_argument_group("recipe"), [s for s in settings if "." not in s.name])
    for part in ("model", "task", "data", "augment", "optim", "scale", "watch"):
        value = getattr(recipe, part)
        kind = f" ({type(value).__name__})" if part in KINDS else ""
        group = parser.add_argument_group(f"{part}{kind}: {_first_line(type(value).__doc__).rstrip('.')}")
        add_settings(group, [s for s in settings if s.name.startswith(f"{part}.")])
    return parser


def _parse(name: str, recipe: Recipe, args: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with what the arguments change in it, and the options of the run."""
    settings = settings_of(recipe)
    args = [arg for arg in args if arg != PRINT]  # jsonargparse has an option of this name for its own files
    options = [option.removeprefix("--") for option, _ in RUN]
    names = [arg.removeprefix("--").partition("=")[0] for arg in args if arg.startswith("--")]
    require_known(names, settings, called=f"recipe {name}", besides=options)
    try:
        values = _parser(name, recipe).parse_args(args).as_dict()
    except ArgumentError as error:
        raise type_error(error, settings, called=f"recipe {name}") from error
    given = {option.replace("-", "_"): values[option.replace("-", "_")] for option in options}
    return build_recipe(recipe, values), given


def _require_consistent(recipe: Recipe, registers: int | None) -> None:
    arch = get_arch(recipe.model.arch)
    if registers is not None and arch.num_registers != registers:
        raise RecipeError(
            f"--registers {registers} contradicts model.arch {arch.name}, which has {arch.num_registers}: "
            "give one of them."
        )


def _dry_run(recipe: Recipe) -> None:
    from vitreg_hub.training.loop import dry_run  # imports late: help needs none of it

    result = dry_run(recipe)
    if not PartialState().is_main_process:
        return
    print(f"steps       {result.steps}")
    print(f"images      {result.images_per_second:.4g} a second, over all processes")
    print(f"time        {duration(result.eta_seconds)}, without evaluations")
    print(f"memory      {result.memory_gib:.2f} GiB at most, of one process")
    print(f"parameters  {result.parameters / 1e6:.1f} M are trained")


def _train(recipe: Recipe, given: dict[str, Any]) -> None:
    from vitreg_hub.training.loop import train

    how = {name: given[name] for name in ("resume", "push", "push_every", "private")}
    result = train(recipe, Path(given["out"]), **how)
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


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]
