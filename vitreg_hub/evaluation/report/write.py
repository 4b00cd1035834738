"""What an evaluation writes: report.json, one PNG per figure, and a page that holds everything."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.report.figures import Examples, eval_figures
from vitreg_hub.evaluation.report.tables import models, sections, summary
from vitreg_hub.evaluation.results import EvalReport, to_json
from vitreg_hub.evaluation.wording import names
from vitreg_hub.files import new_folder, whole_file
from vitreg_hub.pages.content import REPORT_JSON, REPORT_PAGE, ReportFigure
from vitreg_hub.pages.render import html_page
from vitreg_hub.pages.wording import each_once

TITLE = "Scores of Vision Transformers"
INTRODUCTION = Markup("""\
<p>How much the features of Vision Transformers help to recognise things while the transformers stay as they are: what
the paper's third section scores, and what becomes of each score when the registers are changed.
<small>“The paper” is Darcet, Oquab, Mairal and Bojanowski, “Vision Transformers Need Registers”, ICLR 2024.</small>
</p>""")
ARTIFACTS = "Outliers and registers of these models"
END_OF_LINKS = "</nav>"


def write_report(
    reports: Sequence[EvalReport],
    out: str | Path,
    *,
    examples: Sequence[Examples] = (),
    artifacts: str | Path | None = None,
) -> Path:
    """Write the reports of one or more models, side by side, to a new folder, which appears whole or not at all.

    Args:
        reports: In the order in which the models stand side by side.
        out: Must not exist. Gets `report.json`, `report.html`, which needs no other file, and a PNG per figure.
        examples: Pictures of each model, in the same order; none where there are none.
        artifacts: The page of an analysis of these models, or its folder; the two pages link to each other.

    Raises:
        BundleError: The folder exists or cannot be written.
        DataError: `artifacts` is no page of an analysis.
    """
    out = Path(out)
    other = None if artifacts is None else _page(Path(artifacts))
    figures = eval_figures(reports, examples)
    links = {} if other is None else {ARTIFACTS: _relative(other, out)}
    with new_folder(out) as staging:
        (staging / REPORT_JSON).write_text(to_json(reports), encoding="utf-8")
        (staging / REPORT_PAGE).write_text(render(reports, figures, links=links), encoding="utf-8")
        for figure in figures:
            (staging / f"{figure.name}.png").write_bytes(figure.png)
    if other is not None:
        _link(other, out / REPORT_PAGE)
    return out


def render(
    reports: Sequence[EvalReport], figures: Sequence[ReportFigure], *, links: dict[str, str] | None = None
) -> str:
    """The page of one or more models, side by side, with the figures that `eval_figures` made of them."""
    return html_page(
        title=TITLE,
        introduction=INTRODUCTION,
        verdicts=(),
        summary=summary(reports),
        sections=sections(reports),
        figures=figures,
        about="Models, notes and versions",
        tables=(models(reports),),
        notes=each_once({name: r.notes for name, r in zip(names(reports), reports, strict=True)}),
        versions=[report.versions for report in reports],
        links=links,
    )


def _page(artifacts: Path) -> Path:
    page = artifacts / REPORT_PAGE if artifacts.is_dir() else artifacts
    try:
        if END_OF_LINKS in page.read_text(encoding="utf-8"):
            return page
    except (OSError, ValueError) as error:
        raise DataError(f"{page} cannot be read as the page of an analysis: {error}.") from error
    raise DataError(f"{page} is no page of an analysis: give the folder that `vitreg analyze` wrote.")


def _relative(page: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(page.absolute(), folder.absolute())).as_posix())


def _link(page: Path, target: Path) -> None:
    """Add a link to a page's own."""
    link = Markup('\n<a href="{}">{}</a>').format(_relative(target, page.parent), TITLE)
    text = page.read_text(encoding="utf-8")
    if link in text:
        return
    with whole_file(page, replace=True) as file:
        file.write_text(text.replace(END_OF_LINKS, f"{link}{END_OF_LINKS}", 1), encoding="utf-8")
