"""`accelerate launch -m vitreg_hub.training RECIPE ...` is `vitreg train` in many processes."""

import sys

from vitreg_hub.cli.train import run
from vitreg_hub.console import console


def main() -> None:
    """Run the command and leave the process group."""
    run(sys.argv[1:])
    from accelerate import PartialState

    PartialState().destroy_process_group()


with console():
    main()
