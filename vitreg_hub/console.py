"""The frame of every command: exit codes, log lines, and a user's mistake as one sentence."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import DefaultHelpFormatter

from vitreg_hub.errors import (
    HubError,
    HubRefusedError,
    LicenseError,
    RecipeError,
    UnknownArchError,
    VitregError,
    printable,
)

USAGE = 2
"""Exit status of a command line that cannot be read."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell."""
HUB_FAILED = 3
"""Exit status of a command that failed because of the Hub."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the examples as they are written."""


class _OneLine(logging.Formatter):
    """A log line as it is, without what a terminal would obey."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().formatMessage(record).split("\n")))


@contextmanager
def console() -> Iterator[None]:
    """Print log lines as they are, and a user's mistake as one sentence with exit status 1.

    Where the Hub failed but did not refuse, the status is `HUB_FAILED`: a script may try again later. All processes of
    a run read the same settings, so only the first reports what is wrong with them.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("vitreg_hub").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it tells of every try, twice
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
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
