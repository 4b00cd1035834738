"""Everything a user can cause and fix. Any other exception is a bug and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 1500
"""Characters of a message."""

JOINERS = "\u200c\u200d"
"""Invisible, but parts of words and emoji."""


def printable(text: str) -> str:
    """Text that may come from someone else's file: on one line, in characters that a terminal only shows."""
    return "".join(char if char.isprintable() or char in JOINERS else " " for char in text)


class VitregError(ValueError):
    """Base of everything a user can cause and fix. Its message is one line, whatever it quotes."""

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


class UnknownArchError(VitregError):
    """A name that no table has."""


class BundleError(VitregError):
    """A folder or repository that would not load through every door."""


class ConversionError(VitregError):
    """A checkpoint that does not fit its format, or cannot become a bundle."""


class DataError(VitregError):
    """A data set or image that cannot be used as asked."""


class HubError(VitregError):
    """The Hub refused, failed or could not be reached."""


class HubRefusedError(HubError):
    """The Hub refused, and would refuse again."""


class LicenseError(VitregError):
    """Weights whose license is not stated, or does not allow every use."""


class RecipeError(VitregError):
    """A training setting that is wrong or contradicts another."""


class TrainingError(VitregError):
    """A run that cannot go on."""


@contextmanager
def readable(source: str | Path, *, error: type[VitregError] = BundleError) -> Iterator[None]:
    """Read a file or folder that a user named.

    Raises:
        error: The name is empty, which `Path` takes for the current folder, or it cannot be read.
    """
    if not str(source):
        raise error("'' is not a folder: give '.' for the current one.")
    try:
        yield
    except OSError as found:
        raise error(
            f"{found.filename or source} cannot be used ({found.strerror or found}): look at its name, its permissions "
            "and its disk."
        ) from found
