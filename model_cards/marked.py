"""Blocks of a card that may be replaced; whatever stands outside of them is the author's and never touched.

A block begins with the line ``<!-- vitreg:NAME -->`` and ends with the line ``<!-- /vitreg:NAME -->``; Markdown shows
neither. Between them no other such line may stand, so a block that lost its end is none.
"""

import re
from collections.abc import Mapping

BLOCK = re.compile(
    r"^(?P<begin><!-- vitreg:(?P<name>\w+) -->[ \t]*(?P<line_end>\r?\n))"
    r"(?P<text>(?:(?!<!-- /?vitreg:\w+ -->).*\n)*?)"
    r"(?=<!-- /vitreg:(?P=name) -->[ \t]*\r?$)",
    re.MULTILINE,
)
COMMENT = re.compile(r"<!--(?! \{)")
"""A comment that no text of ours holds: it could be the mark of a block."""


def join(blocks: Mapping[str, str]) -> str:
    """Blocks by name, in their order, as the body of a card."""
    marked = (f"<!-- vitreg:{name} -->\n{_lines(text)}<!-- /vitreg:{name} -->\n" for name, text in blocks.items())
    return "\n".join(marked)


def blocks_in(body: str) -> dict[str, str]:
    """The text of every block by its name; of several of one name, the first."""
    return {found["name"]: found["text"] for found in reversed(list(BLOCK.finditer(body)))}


def replace_blocks(body: str, blocks: Mapping[str, str]) -> str:
    """Put new text into the blocks that are there, with their line ends; blocks of other names stay as they are.

    Args:
        body: A card's text.
        blocks: Text by name.
    """

    def new(found: re.Match[str]) -> str:
        if found["name"] not in blocks:
            return found[0]
        return found["begin"] + _lines(blocks[found["name"]]).replace("\n", found["line_end"])

    return BLOCK.sub(new, body)


def _lines(text: str) -> str:
    """Whole lines, in which what looks like a comment is shown as text."""
    shown = COMMENT.sub("&lt;!--", text).strip("\n")
    return f"{shown}\n" if shown else ""
