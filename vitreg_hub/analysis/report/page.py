"""The report as one HTML page that needs nothing else: no network, no script, no other file."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import StrictUndefined, Template
from PIL import Image

from vitreg_hub.analysis.figures.report import ReportFigure
from vitreg_hub.analysis.report.tables import Table, sections, summary
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import names, verdict
from vitreg_hub.plotting import DPI

CSS_PIXELS_PER_INCH = 96


def render(reports: Sequence[ArtifactReport], figures: Sequence[ReportFigure]) -> str:
    """The page of one or more models, side by side, with the figures that `report_figures` made of them."""
    shown = []
    for section in sections(reports):
        own = [figure for figure in figures if figure.section == section.key]
        if own or section.remarks or any(table.rows for table in section.tables):
            shown.append((section, own))
    versions = dict(sorted(pair for report in reports for pair in report.versions.items()))
    text = (files("vitreg_hub.analysis.report") / "page.html").read_text(encoding="utf-8")
    return Template(text, autoescape=True, trim_blocks=True, undefined=StrictUndefined).render(
        verdicts=[(report.model.name, verdict(report)) for report in reports],
        summary=summary(reports),
        sections=shown,
        images=_images(reports),
        notes=_notes(reports),
        made_with=", ".join(f"{library} {version}" for library, version in versions.items()),
        base64=lambda png: base64.b64encode(png).decode(),
        css_size=_css_size,
    )


def _css_size(png: bytes) -> tuple[int, int]:
    """Width and height of a picture on the page."""
    width, height = Image.open(io.BytesIO(png)).size
    return round(width * CSS_PIXELS_PER_INCH / DPI), round(height * CSS_PIXELS_PER_INCH / DPI)


def _images(reports: Sequence[ArtifactReport]) -> Table:
    rows = []
    for name, report in zip(names(reports), reports, strict=True):
        seen = report.images
        rows.append((name, seen.name, f"{seen.num_images:,}", f"{seen.size[0]} x {seen.size[1]}", seen.preprocessing))
    return Table(title="Images", head=("model", "images", "number", "pixels", "preprocessing"), rows=rows)


def _notes(reports: Sequence[ArtifactReport]) -> list[str]:
    """Each note once, with the models that it is about, unless it is about all."""
    by_note: dict[str, list[str]] = {}
    for name, report in zip(names(reports), reports, strict=True):
        for note in report.notes:
            by_note.setdefault(note, []).append(name)
    return [note if len(of) == len(reports) else f"{', '.join(of)}: {note}" for note, of in by_note.items()]
