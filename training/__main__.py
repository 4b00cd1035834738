"""`accelerate launch -m vitreg_hub.training RECIPE ...` is `vitreg train` in many processes."""

import sys

from accelerate import PartialState

from vitreg_hub.console import console
from vitreg_hub.training.command import run_command

with console():
    run_command(sys.argv[1:])
    PartialState().destroy_process_group()
