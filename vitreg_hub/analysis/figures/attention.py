"""The figure of where attention goes, in shares."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from vitreg_hub.analysis.results import ArtifactReport, AttentionMass
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.figures import legend, panels, patch
from vitreg_hub.plotting import CLASS, NORMAL, OUTLIER, REGISTER, percent_axis

TARGETS = (
    ("to_class", CLASS, "class tokens"),
    ("to_registers", REGISTER, "registers"),
    ("to_normal", NORMAL, "normal patches"),
    ("to_outliers", OUTLIER, "outliers"),
)
READABLE_SHARE = 0.07
"""Smallest share of a bar that a number fits into."""


def attention_mass_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Shares of the attention of class tokens and registers that go to each kind of token, below a bar of how many
    tokens are of each kind: where a bar differs from that one, attention prefers some tokens."""
    most = max(len(report.attention) for report in reports)
    figure, axes = panels(
        names(reports), title="What class token and registers attend to", height=1.5 + 0.28 * most, share="x"
    )
    for axis, report in zip(axes, reports, strict=True):
        rows = [token_shares(report), *report.attention]
        for place, row in enumerate(rows):
            left = 0.0
            for name, colour, _ in TARGETS:
                share = getattr(row, name)
                axis.barh(place, share, left=left, height=0.78, color=colour, alpha=0.55 if place == 0 else 1)
                if share > READABLE_SHARE:
                    ink = "black" if place == 0 or colour == REGISTER else "white"
                    middle, said = left + share / 2, f"{100 * share:.0f} %"
                    axis.text(middle, place, said, ha="center", va="center", fontsize=7, color=ink)
                left += share
        axis.spines["left"].set_visible(False)
        axis.axhline(0.5, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row.source for row in rows], fontsize=8)
        axis.set(xlabel=f"share of attention in block {report.block}", xlim=(0, 1), ylim=(most + 0.55, -0.55))
        axis.set_xticks((0, 0.25, 0.5, 0.75, 1))
    percent_axis(axes[0].xaxis)
    seen = [masses for report in reports for masses in (token_shares(report), *report.attention)]
    legend(figure, [patch(colour, label) for name, colour, label in TARGETS if any(getattr(m, name) for m in seen)])
    return figure


def token_shares(report: ArtifactReport) -> AttentionMass:
    """The shares of the tokens themselves: what attention would be if it preferred none."""
    patches = report.images.grid[0] * report.images.grid[1]
    tokens = report.model.num_class_tokens + report.model.num_registers + patches
    outliers = report.outlier_fraction[report.block] * patches
    return AttentionMass(
        source="share of tokens",
        to_class=report.model.num_class_tokens / tokens,
        to_registers=report.model.num_registers / tokens,
        to_normal=(patches - outliers) / tokens,
        to_outliers=outliers / tokens,
    )
