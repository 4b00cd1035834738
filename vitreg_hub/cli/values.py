"""What several commands do with their arguments and print."""

import sys
from typing import Any

from vitreg_hub.errors import VitregError, printable


def image_size(given: str | None) -> tuple[int, int] | None:
    """Height and width in pixels.

    Raises:
        VitregError: It is neither a side nor two sides.
    """
    if given is None:
        return None
    sides = given.split(",")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise VitregError(f"--img-size takes a side, or height and width, in pixels (224 or 224,336), not {given!r}.")
    return int(sides[0]), int(sides[-1])


def analysis_options(*, block: int, img_size: str | None, device: str | None, dtype: str) -> dict[str, Any]:
    """The options that all commands of analysis share.

    Raises:
        VitregError: `img_size` is not a size.
    """
    import torch

    size, kind = image_size(img_size), getattr(torch, dtype)
    return {"block": block, "img_size": size, "device": device, "dtype": kind, "progress": sys.stderr.isatty()}


def print_doors(differences: dict[str, float]) -> None:
    """Print how far apart the outputs of a bundle's doors are."""
    for door, difference in differences.items():
        print(f"opens    in {door.ljust(24)} largest difference {difference:g}")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns, under the titles in the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in [tuple(map(printable, row)) for row in rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())
