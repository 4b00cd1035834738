"""Train, convert, check and publish Vision Transformers with registers."""

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from jsonargparse import ArgumentParser

from vitreg_hub.cli.arguments import call, summary
from vitreg_hub.console import USAGE, HelpFormatter, console
from vitreg_hub.tested import version_text

TRAIN = "train"
COMMANDS = [
    *(TRAIN, "quickstart", "list", "info", "verify", "convert", "export"),
    *("analyze", "attention", "evaluate", "predict", "features", "push", "pull"),
]
"""Every command has a module of its name, imported when it is called, with a function `run`.

That function imports what takes long, so that help, lists and mistakes come at once.
"""

EXAMPLES = """examples:
  vitreg quickstart                          train a register ViT on real digits, bundle, verify, draw (about 2 minutes)
  vitreg list 'vit_*_reg4*'                  architectures with four registers
  vitreg info hf-hub:org/name                what a model is and where it came from; also a folder, or a name of `list`
  vitreg train supervised_digits --registers 0 --out plain   any recipe; run it again and it goes on where it stopped
  vitreg train dinov2_vitl14 --help          its settings; `vitreg train --help` lists the recipes
  vitreg train deit3_base --config mine.yaml --optim.lr 2e-3 --out runs/base --push org/name
  vitreg verify quickstart/model             open a bundle through timm and transformers, with and without vitreg_hub
  vitreg convert dinov2_vitl14_pretrain.pth vitl --license apache-2.0   or of DINO, DeiT, OpenCLIP, transformers, timm
  vitreg convert hf-hub:org/name folder --registers 4 --verify
  vitreg export folder dinov2.pth --format dinov2    and back
  vitreg analyze quickstart/model --images digits    are there high-norm artifacts? report.html, figures, numbers
  vitreg analyze vit_small_reg4.dinov2_lvd142m runs/vitl --out report   side by side, and over a run's checkpoints
  vitreg evaluate knn quickstart/model               scores: k-NN, linear, segmentation, depth, discovery ... or all
  vitreg attention quickstart/model cat.png  what the class token and each register attend to
  vitreg predict vit_nano_reg4.digits cat.png pictures --top 3   which classes, as a table, CSV or JSON
  vitreg features vit_small_reg4.dinov2_lvd142m --images pictures --out features   run it again and it goes on
  vitreg push quickstart/model org/name      publish it in one commit; --dry-run lists what would be sent
  vitreg list --hub 'org/*'                  published models
  vitreg pull org/name folder                fetch a published bundle
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    A user's mistake ends in one sentence on stderr and exit status 1; wrong arguments in usage and status 2. What
    `train` takes depends on the recipe, so it reads its own arguments.
    """
    args = sys.argv[1:] if args is None else args
    if set(args) == {"--version", "--verbose"}:
        print(version_text(verbose=True))
        return
    name, *rest = args or [""]
    if name.startswith("-"):
        _parser().parse_args([name])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        mistake = f"there is no command {name}: {hint}" if name else "give a command: "
        print(f"vitreg: {mistake}`vitreg --help` lists all.", file=sys.stderr)
        sys.exit(USAGE)
    if name == TRAIN:
        with console():
            _command(name)(rest)
    else:
        call(_command(name), rest, called=f"vitreg {name}")


def _parser() -> ArgumentParser:
    """The parser for `vitreg --help`; every command reads its own arguments."""
    parser = ArgumentParser(prog="vitreg", description=__doc__, epilog=EXAMPLES, formatter_class=HelpFormatter)
    parser.add_argument(
        "--version", action="version", version=version_text(), help="print it; with --verbose, the libraries' too"
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name in COMMANDS:
        subcommands.add_subcommand(name, ArgumentParser(), help=summary(_command(name)))
    return parser


def _command(name: str) -> Callable[..., None]:
    return import_module(f"vitreg_hub.cli.{name}").run
