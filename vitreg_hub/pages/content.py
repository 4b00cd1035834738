"""What a page holds: tables of text, figures, and sections of both."""

from collections.abc import Sequence
from dataclasses import dataclass

REPORT_JSON = "report.json"
REPORT_PAGE = "report.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Text in rows and columns.

    Attributes:
        folded: Whether it is long and shown only on demand.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One thing that was measured.

    Attributes:
        meaning: In one sentence, for readers who do not know the field.
        tables: The numbers; tables without rows are not shown.
        remarks: Why something is missing, and what else a reader must know.
    """

    key: str
    title: str
    meaning: str
    definition: str
    tables: tuple[Table, ...] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFigure:
    """A figure of a report.

    Attributes:
        section: Key of the section that it belongs to.
        name: Of its file, without the ending; lower case letters, digits and underscores.
    """

    section: str
    name: str
    alt: str
    caption: str
    png: bytes
