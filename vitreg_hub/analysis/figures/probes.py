"""Figures of how similar patches are, and of what linear probes find out from their tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vitreg_hub.analysis.results import ArtifactReport, LocalInformation, Redundancy
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.figures import legend, line, panels, patch
from vitreg_hub.pages.wording import percent
from vitreg_hub.plotting import CHANCE, CLASS, NORMAL, OUTLIER, REGISTER, number, percent_axis, plain

CURVE_POINTS = 40
"""About how many bins a density has; there may be few outliers to fill them."""
COLOURS = {"normal": NORMAL, "outlier": OUTLIER}
LOCAL_MEASURES = (
    ("Place found exactly", "share of tokens (higher is better)", "position_accuracy", "chance_accuracy"),
    ("Distance to the true place", "patches (lower is better)", "position_distance", "chance_distance"),
    ("Error of the pixels", "L2 norm (lower is better)", "pixel_error", "chance_error"),
)


def redundancy_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Densities of the similarity of patches to their neighbours, for normal patches and those that become outliers.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figure 5a.
    """
    figure, axes = panels(names(reports), title="How similar patches are to their neighbours")
    measured = [_measured(report.redundancy) for report in reports]
    lowest = min(2 * np.flatnonzero(g.counts)[0] / len(g.counts) - 1 for groups in measured for g in groups.values())
    for axis, groups in zip(axes, measured, strict=True):
        for name, group in groups.items():
            at, density = _density(group.counts, lowest)
            axis.stairs(density, at, color=COLOURS[name], fill=True, alpha=0.35)
            axis.stairs(density, at, color=COLOURS[name], linewidth=1.6)
            axis.axvline(group.mean, color=COLOURS[name], linestyle=":", linewidth=1.6)
        axis.set(xlabel="mean cosine similarity to the neighbours", ylabel="density of patches", xlim=(lowest, 1.0))
    shown = [patch(NORMAL, "normal patches")]
    if any(report.redundancy.outlier for report in reports):
        shown.append(patch(OUTLIER, "patches that become outliers"))
    legend(figure, [*shown, line(CHANCE, "mean", ":")])
    return figure


def local_information_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """What linear probes find out from a token about its own place and pixels, for normal tokens and for outliers."""
    figure = Figure(figsize=(10.8, 2.0 + 0.55 * len(reports)), layout="constrained")
    figure.suptitle("What a single patch token says about its own place and pixels", fontsize=12)
    axes = figure.subplots(1, len(LOCAL_MEASURES), sharey=True)
    measured = [_measured(report.local_information) for report in reports]
    for axis, (title, unit, value, chance) in zip(axes, LOCAL_MEASURES, strict=True):
        say_number = percent if value == "position_accuracy" else number
        found = [getattr(probe, name) for probes in measured for probe in probes.values() for name in (value, chance)]
        most = max(found) or 1.0
        for row, probes in enumerate(measured):
            places = (row - 0.2, row + 0.2) if len(probes) > 1 else (row,)
            for place, group in zip(places, probes, strict=True):
                width, by_chance = getattr(probes[group], value), getattr(probes[group], chance)
                bars = axis.barh(place, width, height=0.36, color=COLOURS[group])
                axis.vlines(by_chance, place - 0.18, place + 0.18, color=CHANCE, linewidth=2.2, gid="chance")
                how = {"label_type": "center", "color": "white"} if width > 0.5 * most else {"padding": 4}
                axis.bar_label(bars, [say_number(width)], fontsize=8, **how)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=unit, xlim=(0, 1.12 * most), ylim=(len(reports) - 0.45, -0.55))
        axis.set_yticks(range(len(reports)), [plain(name) for name in names(reports)], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    percent_axis(axes[0].xaxis)
    chance = line(CHANCE, "best constant answer (chance)")
    groups = {"normal": patch(NORMAL, "normal patches"), "outlier": patch(OUTLIER, "outliers")}
    legend(figure, [*(groups[g] for g in groups if any(g in probes for probes in measured)), chance])
    return figure


def global_information_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Accuracy of image classification from one token alone, by kind of token."""
    most = max(len(report.global_information.tokens) for report in reports)
    figure, axes = panels(
        names(reports), title="What a single token says about the whole image", height=1.2 + 0.24 * most, share="x"
    )
    for axis, report in zip(axes, reports, strict=True):
        found = report.global_information
        places = range(len(found.tokens))
        colours = [token_colour(token.token) for token in found.tokens]
        bars = axis.barh(places, [token.accuracy for token in found.tokens], color=colours, height=0.75)
        axis.bar_label(bars, [percent(token.accuracy) for token in found.tokens], padding=3, fontsize=8)
        axis.set_yticks(places, [token.token for token in found.tokens], fontsize=8)
        if found.chance is not None:
            axis.vlines(found.chance, -0.6, len(places) - 0.4, color=CHANCE, linestyle="--", linewidth=1.4)
        axis.set(xlabel=f"top-1 accuracy, {found.num_classes} classes", ylim=(most - 0.4, -0.6))
        axis.set_xlim(0, 1.18)
        axis.spines["left"].set_visible(False)
        axis.set_xticks((0, 0.25, 0.5, 0.75, 1))
    percent_axis(axes[0].xaxis)
    legend(figure, [line(CHANCE, "always the most frequent class (chance)", "--")])
    return figure


def token_colour(token: str) -> str:
    """The colour of a kind of token, by the token's name in a report."""
    kind = token.partition(" ")[0]
    return {"class": CLASS, "register": REGISTER, "outlier": OUTLIER}.get(kind, NORMAL)


def _density(counts: Sequence[int], lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges in [-1, 1] and a density that integrates to 1, in about `CURVE_POINTS` bins above the lowest similarity."""
    shown = len(counts) * (1 - lowest) / 2
    merged = max(1, int(shown // CURVE_POINTS))
    # Bins are full from 1 down, where most similarities are; what does not fill a bin is at -1.
    padded = np.pad(np.array(counts, dtype=float), (-len(counts) % merged, 0)).reshape(-1, merged).sum(axis=1)
    width = 2 * merged / len(counts)
    return 1 - width * np.arange(len(padded), -1, -1), padded / (padded.sum() * width)


def _measured(result: Redundancy | LocalInformation) -> dict[str, Any]:
    """What was measured in each group of patches."""
    groups = {"normal": result.normal, "outlier": result.outlier}
    return {name: group for name, group in groups.items() if group is not None}
