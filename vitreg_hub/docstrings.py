"""What Google-style docstrings say: the texts of help pages, which are written there alone."""

import inspect
import re


def summary(documented: object) -> str:
    """The first line."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def texts(documented: object) -> dict[str, str]:
    """What is said of each argument of a function, or each attribute of a class."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    entries = re.findall(r"^    \*{0,2}(\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
