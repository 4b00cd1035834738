"""The figure that compares models or checkpoints: when, where and from which size on outliers appear."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.figures import legend, line
from vitreg_hub.pages.wording import amount
from vitreg_hub.plotting import NORMAL, OUTLIER, log_axis, percent_axis, plain, positive_limits, whole_numbers

NORM_LINES = ((0.5, NORMAL, "o", "median"), (0.99, "#888888", "s", "99 % quantile"), (1.0, "#000000", "^", "largest"))


def comparison_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Share of outliers, norms, and blocks with outliers: over training steps if every model has its own, else over
    models from the fewest parameters to the most.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figures 4b and 4c.
    """
    steps = in_training(reports)
    named = list(zip(reports, names(reports), strict=True))
    if steps:
        named.sort(key=lambda pair: pair[0].model.step or 0)
        places = [report.model.step for report, _ in named]
    else:
        named.sort(key=lambda pair: pair[0].model.num_params)
        places = list(range(len(named)))
    chosen = [report.chosen for report, _ in named]
    figure = Figure(figsize=(10.8, 3.9) if steps else (max(10.8, 0.8 * len(reports)), 4.8), layout="constrained")
    figure.suptitle("When outliers appear" if steps else "In which models outliers appear", fontsize=12)
    shares, norms, depths = figure.subplots(1, 3)
    style = {"linestyle": "-" if steps else "", "markersize": 6}

    shares.plot(places, [block.outlier_fraction for block in chosen], "o", color=OUTLIER, **style)
    shares.set(title="Share of outliers", ylabel="share of patch tokens")
    most = max(block.outlier_fraction for block in chosen)
    shares.set_ylim(-0.04 * most or -0.001, 1.12 * most or 0.01)
    percent_axis(shares.yaxis)

    shown = []
    for quantile, colour, marker, label in NORM_LINES:
        values = [block.quantile(quantile) for block in chosen]
        shown += norms.plot(places, values, marker, color=colour, label=f"norm: {label}", **style)
    low, high = positive_limits([value for line in shown for value in line.get_ydata()])
    norms.set(title="Norms of the patch tokens", ylabel="norm", yscale="log", ylim=(low, high))
    log_axis(norms.yaxis, low, high)

    for place, (report, _) in zip(places, named, strict=True):
        found = np.flatnonzero(report.outlier_fraction)
        depth = len(report.blocks)
        depths.plot(np.full(depth, place), range(depth), "_", color="#bbbbbb", markersize=9, markeredgewidth=1)
        depths.plot(np.full(len(found), place), found, "s", color=OUTLIER, markersize=5, gid="with outliers")
    depths.set(title="Blocks with outliers", ylabel="block (the first is 0)")
    whole_numbers(depths.yaxis)

    labels = [f"{plain(name)}  {amount(report.model.num_params)}" for report, name in named]
    for axis in (shares, norms, depths):
        axis.title.set_fontsize(10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if steps:
            axis.set_xlabel("training step")
            whole_numbers(axis.xaxis, 4)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            axis.margins(x=0.08)
        else:
            axis.set_xticks(places, labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=7)
            axis.set_xlim(-0.6, len(places) - 0.4)
    shown.append(line("#bbbbbb", "block"))
    if most:
        shown.append(Line2D([], [], color=OUTLIER, marker="s", linestyle="", label="block with outliers"))
    legend(figure, shown)
    return figure


def in_training(reports: Sequence[ArtifactReport]) -> bool:
    """Whether the models are checkpoints of one run: each has a training step of its own."""
    steps = {report.model.step for report in reports}
    return None not in steps and len(steps) == len(reports)
