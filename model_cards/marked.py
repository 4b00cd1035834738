"""Blocks of a card that may be replaced; everything outside them is the author's and never touched.

A block begins with the line ``<!-- vitreg:NAME -->`` and ends with the line ``<!-- /vitreg:NAME -->``; Markdown shows
neither. No other such line may stand between them, so a block without its end is none; see `require_whole`.
"""

import re
from collections.abc import Mapping

from vitreg_hub.errors import BundleError

BLOCK = re.compile(
    r"^(?P<begin><!-- vitreg:(?P<name>\w+) -->[ \t]*(?P<line_end>\r?\n))"
    r"(?P<text>(?:(?!<!-- /?vitreg:\w+ -->).*\n)*?)"
    r"(?=<!-- /vitreg:(?P=name) -->[ \t]*\r?$)",
    re.MULTILINE,
)
MARK = re.compile(r"^<!-- (?P<end>/?)vitreg:(?P<name>\w+) -->", re.MULTILINE)
TAG = re.compile(r"<(?=[a-zA-Z/?!])(?!!-- \{)")
"""HTML, which our texts never hold: it could be someone's script, or a comment that is the mark of a block."""


def join(blocks: Mapping[str, str]) -> str:
    """Blocks by name, in their order, as the body of a card."""
    marked = (f"<!-- vitreg:{name} -->\n{_lines(text)}<!-- /vitreg:{name} -->\n" for name, text in blocks.items())
    return "\n".join(marked)


def blocks_in(body: str) -> dict[str, str]:
    """The text of every block by its name; the first of several with one name."""
    return {found["name"]: found["text"] for found in reversed(list(BLOCK.finditer(body)))}


def require_whole(body: str) -> None:
    """Refuse a card in which a block has lost its begin or end: its text on older weights would stay.

    Raises:
        BundleError: With the mark that is missing.
    """
    whole = {place for found in BLOCK.finditer(body) for place in found.span()}  # it ends where its last mark begins
    for mark in MARK.finditer(body):
        if mark.start() not in whole:
            other = f"<!-- {'' if mark['end'] else '/'}vitreg:{mark['name']} -->"
            raise BundleError(
                f"the card (README.md) has the line {mark[0]} without {other}, so that vitreg_hub's text cannot be "
                "brought up to date: put that line back, or delete this one with the text that belongs to it."
            )


def replace_blocks(body: str, blocks: Mapping[str, str]) -> str:
    """Put new texts, by name, into a card's blocks, with its line ends; other blocks stay as they are."""

    def new(found: re.Match[str]) -> str:
        if found["name"] not in blocks:
            return found[0]
        return found["begin"] + _lines(blocks[found["name"]]).replace("\n", found["line_end"])

    return BLOCK.sub(new, body)


def _lines(text: str) -> str:
    """Complete lines, in which anything like HTML is shown as text."""
    shown = TAG.sub("&lt;", text).strip("\n")
    return f"{shown}\n" if shown else ""
