"""The report as one HTML page that needs nothing else: no network, no script, no other file."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

from vitreg_hub.analysis.figures.report import ReportFigure
from vitreg_hub.analysis.report.tables import Section, Table, sections, summary
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import names, verdict
from vitreg_hub.plotting import DPI

TITLE = "Outliers and registers in Vision Transformers"
INTRODUCTION = (
    "Some Vision Transformers turn a few of their patch tokens into “outliers” (also called artifacts): tokens with a "
    "norm several times that of the others, which have given up what they knew about their patch and hold information "
    "about the whole image. Registers are additional tokens that belong to no patch and give the model a place for "
    "this information, so that all patch tokens stay what they are."
)
SOURCE = (
    "“The paper” is Darcet, Oquab, Mairal and Bojanowski, “Vision Transformers Need Registers”, ICLR 2024; what is "
    "said of it is about its models and need not hold for those below."
)
CSS_PIXELS_PER_INCH = 96
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #5a5a5a; --line: #d5d5d5; --shade: #f4f4f2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --faint: #a9a9a9; --line: #3c3c3c; --shade: #222; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
nav a { display: inline-block; margin-right: 1rem; padding: .2rem 0; }
a { color: inherit; }
small, figcaption, caption { color: var(--faint); font-size: .875rem; }
figcaption { padding-top: .25rem; }
p small { display: block; }
figure { margin: 1.25rem 0; }
.wide { overflow-x: auto; }
figure .wide { background: #fff; border: 1px solid var(--line); border-radius: 4px; padding: .25rem; }
img { display: block; max-width: max(100%, 36rem); height: auto; margin: 0 auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-size: .875rem; }
th { font-weight: 600; max-width: 20rem; overflow-wrap: break-word; min-width: 4.5rem; }
td { white-space: nowrap; }
td:last-child { white-space: normal; min-width: 10rem; }
.verdicts { padding: .5rem 1rem; background: var(--shade); border-radius: 4px; }
.verdicts dt { font-weight: 600; margin-top: .5rem; }
.verdicts dd { margin: 0 0 .5rem; }
summary { cursor: pointer; padding: .25rem 0; }
"""


def render(reports: Sequence[ArtifactReport], figures: Sequence[ReportFigure]) -> str:
    """Write the page.

    Args:
        reports: One per model, in the order in which they stand side by side.
        figures: Of the same reports (`figures.report_figures`).
    """
    shown = [section for section in sections(reports) if _has_anything(section, figures)]
    links = "".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for section in shown)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{TITLE}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{TITLE}</h1>
<p>{escape(INTRODUCTION)} <small>{escape(SOURCE)}</small></p>
{_verdicts(reports)}
{_table(summary(reports))}
<nav aria-label="Sections">{links}<a href="#about">Images, notes and versions</a></nav>
{"".join(_section(section, figures) for section in shown)}
{_about(reports)}
</main>
</body>
</html>
"""


def _has_anything(section: Section, figures: Sequence[ReportFigure]) -> bool:
    return bool(section.tables or section.remarks or any(figure.section == section.key for figure in figures))


def _verdicts(reports: Sequence[ArtifactReport]) -> str:
    items = "".join(f"<dt>{escape(r.model.name)}</dt><dd>{escape(verdict(r))}</dd>\n" for r in reports)
    return f'<dl class="verdicts">\n{items}</dl>'


def _section(section: Section, figures: Sequence[ReportFigure]) -> str:
    own = [_figure(figure) for figure in figures if figure.section == section.key]
    return f"""<section id="{section.key}">
<h2>{escape(section.title)}</h2>
<p>{escape(section.meaning)} <small>{escape(section.definition)}</small></p>
{"".join(own)}{_list(section.remarks)}{"".join(_table(table) for table in section.tables)}</section>
"""


def _figure(figure: ReportFigure) -> str:
    data = base64.b64encode(figure.png).decode()
    width, height = (round(pixels * CSS_PIXELS_PER_INCH / DPI) for pixels in Image.open(io.BytesIO(figure.png)).size)
    size = f'width="{width}" height="{height}"'
    return f"""<figure id="figure-{escape(figure.name)}">
<div class="wide" tabindex="0"><img src="data:image/png;base64,{data}" {size} alt="{escape(figure.alt)}"></div>
<figcaption>{escape(figure.caption)}</figcaption>
</figure>
"""


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in table.rows
    )
    caption = "" if table.folded else f"<caption>{escape(table.title)}</caption>"
    inner = f"{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody>"
    text = f'<div class="wide" tabindex="0"><table>{inner}</table></div>\n'
    return f"<details><summary>{escape(table.title)}</summary>{text}</details>\n" if table.folded else text


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>\n" if items else ""


def _about(reports: Sequence[ArtifactReport]) -> str:
    named = list(zip(names(reports), reports, strict=True))
    rows = []
    for name, report in named:
        seen = report.images
        size = f"{seen.size[0]} x {seen.size[1]}"
        rows.append((name, seen.name, f"{seen.num_images:,}", size, seen.preprocessing))
    images = Table(title="Images", head=("model", "images", "number", "pixels", "preprocessing"), rows=tuple(rows))
    by_note: dict[str, list[str]] = {}
    for name, report in named:
        for note in report.notes:
            by_note.setdefault(note, []).append(name)
    notes = [note if len(of) == len(reports) else f"{', '.join(of)}: {note}" for note, of in by_note.items()]
    versions = dict(sorted(pair for report in reports for pair in report.versions.items()))
    made_by = ", ".join(f"{library} {version}" for library, version in versions.items())
    return f"""<section id="about">
<h2>Images, notes and versions</h2>
{_table(images)}{_list(notes)}<p><small>Made with {escape(made_by)}.</small></p>
</section>
"""
