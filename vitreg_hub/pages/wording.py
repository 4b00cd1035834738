"""Names and numbers in words: the same in figures, tables and on the command line."""

import math
from collections.abc import Mapping, Sequence

LONGEST_NAME = 34


def percent(share: float | None) -> str:
    """A share in [0, 1] with three digits; only zero reads as zero."""
    if share is None or not math.isfinite(share):
        return "-"
    return "under 0.001 %" if 0 < share < 1e-5 else f"{100 * share:.3g} %"


def interval(shares: tuple[float, float] | None) -> str:
    """From the lower to the upper share."""
    return "-" if shares is None else " to ".join(map(percent, shares))


def amount(count: int) -> str:
    """Millions and billions with three digits."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """Short, distinct names of models, each in one line; long ones lose their middle."""
    found: list[str] = []
    for full in names:
        name = "".join(c if c.isprintable() else " " for c in full).strip() or "unnamed"
        if len(name) > LONGEST_NAME:
            name = f"{name[:11]}…{name[12 - LONGEST_NAME :]}"
        unique, copies = name, 1
        while unique in found:
            copies += 1
            unique = f"{name} ({copies})"
        found.append(unique)
    return tuple(found)


def each_once(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """Each of the notes by model once, with the models that it is about, unless it is about all."""
    by_note: dict[str, list[str]] = {}
    for name, own in notes.items():
        for note in own:
            by_note.setdefault(note, []).append(name)
    return [note if len(of) == len(notes) else f"{', '.join(of)}: {note}" for note, of in by_note.items()]
