"""Reads Google-style docstrings: help pages take their texts from there."""

import inspect
import re


def summary(documented: object) -> str:
    """The first line."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def texts(documented: object) -> dict[str, str]:
    """The text of each argument of a function, or of each attribute of a class."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    entries = re.findall(r"^    \*{0,2}(\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
