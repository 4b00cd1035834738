"""The frame of every command: exit codes, log lines, and a user's mistake as one sentence."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import DefaultHelpFormatter

from vitreg_hub.errors import HubError, HubRefusedError, LicenseError, RecipeError, UnknownArchError, VitregError

USAGE = 2
"""Exit status of a command line that cannot be read."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""
HUB_FAILED = 3
"""Exit status of a command that failed because of the Hub."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the examples as they are written."""


@contextmanager
def console() -> Iterator[None]:
    """Print log lines as they are, and a user's mistake as one sentence with exit status 1.

    Where the Hub failed but did not refuse, the status is `HUB_FAILED`: a script may try again later. All processes of
    a run read the same settings, so only the first reports what is wrong with them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("vitreg_hub").setLevel(logging.INFO)
    try:
        yield
        sys.stdout.flush()
    except VitregError as error:
        if isinstance(error, HubError) and not isinstance(error, HubRefusedError):
            print(f"vitreg: {error}", file=sys.stderr)
            sys.exit(HUB_FAILED)
        silent = isinstance(error, LicenseError | RecipeError | UnknownArchError) and os.environ.get("RANK", "0") != "0"
        sys.exit(1 if silent else f"vitreg: {error}")
    except BrokenPipeError:  # `vitreg list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("vitreg: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def hide_loading() -> None:
    """Turn off the bars of transformers, and with them the Hub's: a command that loads models calls this first."""
    from transformers.utils import logging as transformers_logging  # takes seconds

    transformers_logging.disable_progress_bar()


def show_transfers() -> None:
    """Show the Hub's bars again, unless nobody can see them or the user has turned them off."""
    import huggingface_hub as hf

    if sys.stderr.isatty() and hf.constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        hf.utils.enable_progress_bars()
