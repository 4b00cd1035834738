"""The analysis as one HTML page."""

from collections.abc import Sequence

from markupsafe import Markup

from vitreg_hub.analysis.report.tables import sections, summary
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import names, verdict
from vitreg_hub.pages.content import ReportFigure, Table
from vitreg_hub.pages.render import html_page
from vitreg_hub.pages.wording import each_once

INTRODUCTION = Markup("""\
<p>Some Vision Transformers turn a few of their patch tokens into “outliers” (also called artifacts): tokens with a norm
several times that of the others, which have given up what they knew about their patch and hold information about the
whole image. Registers are additional tokens that belong to no patch and give the model a place for this information, so
that all patch tokens stay what they are.
<small>“The paper” is Darcet, Oquab, Mairal and Bojanowski, “Vision Transformers Need Registers”, ICLR 2024; what is
said of it is about its models and need not hold for those below.</small></p>""")


def render(reports: Sequence[ArtifactReport], figures: Sequence[ReportFigure]) -> str:
    """The page of one or more models, side by side, with the figures that `report_figures` made of them."""
    return html_page(
        title="Outliers and registers in Vision Transformers",
        introduction=INTRODUCTION,
        verdicts=[(report.model.name, verdict(report)) for report in reports],
        summary=summary(reports),
        sections=sections(reports),
        figures=figures,
        about="Images, notes and versions",
        tables=(_images(reports),),
        notes=each_once({name: r.notes for name, r in zip(names(reports), reports, strict=True)}),
        versions=[report.versions for report in reports],
    )


def _images(reports: Sequence[ArtifactReport]) -> Table:
    rows = []
    for name, report in zip(names(reports), reports, strict=True):
        seen = report.images
        rows.append((name, seen.name, f"{seen.num_images:,}", f"{seen.size[0]} x {seen.size[1]}", seen.preprocessing))
    return Table(title="Images", head=("model", "images", "number", "pixels", "preprocessing"), rows=rows)
