"""A report as one HTML page that needs nothing else: no network, no script, no other file."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from jinja2 import StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from vitreg_hub.pages.content import ReportFigure, Section, Table
from vitreg_hub.plotting import DPI

CSS_PIXELS_PER_INCH = 96


def html_page(
    *,
    title: str,
    introduction: Markup,
    verdicts: Sequence[tuple[str, str]],
    summary: Table,
    sections: Sequence[Section],
    figures: Sequence[ReportFigure],
    about: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    versions: Iterable[Mapping[str, str]],
    links: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        title: Of the page.
        introduction: HTML of its first paragraph.
        verdicts: What was found, in words, by model.
        summary: What was found, in numbers.
        sections: Those without anything to show are left out.
        figures: Of all sections.
        about: Title of the last section, which says of what and how everything was made.
        tables: Of the last section.
        notes: Of the last section.
        versions: Of the libraries that made each of the reports.
        links: To other pages, by their titles.
    """
    shown = []
    for section in sections:
        own = [figure for figure in figures if figure.section == section.key]
        if own or section.remarks or any(table.rows for table in section.tables):
            shown.append((section, own))
    libraries = dict(sorted(pair for found in versions for pair in found.items()))
    text = (files("vitreg_hub.pages") / "page.html").read_text(encoding="utf-8")
    return Template(text, autoescape=True, trim_blocks=True, undefined=StrictUndefined).render(
        title=title,
        introduction=introduction,
        verdicts=verdicts,
        summary=summary,
        sections=shown,
        about=about,
        tables=tables,
        notes=notes,
        made_with=", ".join(f"{library} {version}" for library, version in libraries.items()),
        links=links or {},
        base64=lambda png: base64.b64encode(png).decode(),
        css_size=_css_size,
    )


def _css_size(png: bytes) -> tuple[int, int]:
    """Width and height of a picture on the page."""
    width, height = Image.open(io.BytesIO(png)).size
    return round(width * CSS_PIXELS_PER_INCH / DPI), round(height * CSS_PIXELS_PER_INCH / DPI)
