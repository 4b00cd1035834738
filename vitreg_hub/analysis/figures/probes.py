"""Figures of what patches look like and of what linear probes read from their tokens."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitreg_hub.analysis.figures.base import legend, line, panels, patch, say
from vitreg_hub.analysis.results import ArtifactReport, LocalProbe
from vitreg_hub.analysis.wording import names, percent
from vitreg_hub.plotting import CHANCE, CLASS, NORMAL, OUTLIER, REGISTER, number, percent_axis, plain

CURVE_POINTS = 40
"""About as many bins as a density shows; there may be few outliers to fill them."""
GROUPS = (("normal", NORMAL), ("outlier", OUTLIER))
LOCAL_MEASURES = (
    ("Place found exactly", "share of tokens (higher is better)", "position_accuracy", "chance_accuracy"),
    ("Distance to the true place", "patches (lower is better)", "position_distance", "chance_distance"),
    ("Error of the pixels", "L2 norm (lower is better)", "pixel_error", "chance_error"),
)


def redundancy_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Densities of the likeness of patches to their neighbours, of normal patches and of those that become outliers.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figure 5a.
    """
    figure, axes = panels(reports, title="How much patches are like their neighbours")
    groups = [g for r in reports for g in (r.redundancy.normal, r.redundancy.outlier) if g is not None]
    lowest = min(2 * np.flatnonzero(group.counts)[0] / len(group.counts) - 1 for group in groups)
    for axis, report in zip(axes, reports, strict=True):
        drawn = 0
        for name, colour in GROUPS:
            group = getattr(report.redundancy, name)
            if group is None:
                continue
            at, density = _density(group.counts, lowest)
            axis.stairs(density, at, color=colour, fill=True, alpha=0.35)
            axis.stairs(density, at, color=colour, linewidth=1.6)
            axis.axvline(group.mean, color=colour, linestyle=":", linewidth=1.6)
            drawn += 1
        if not drawn:
            say(axis, "Neighbours of patches were not compared.")
            continue
        axis.set(xlabel="mean cosine similarity to the neighbours", ylabel="density of patches", xlim=(lowest, 1.0))
    shown = [patch(NORMAL, "normal patches")]
    if any(report.redundancy.outlier for report in reports):
        shown.append(patch(OUTLIER, "patches that become outliers"))
    legend(figure, [*shown, line(CHANCE, "mean", ":")])
    return figure


def local_information_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """What linear probes read from a token about its own place and pixels, of normal tokens and of outliers."""
    figure = Figure(figsize=(10.8, 2.0 + 0.55 * len(reports)), layout="constrained")
    figure.suptitle("What a single patch token says about its own place and pixels", fontsize=12)
    axes = figure.subplots(1, len(LOCAL_MEASURES), sharey=True)
    for axis, (title, unit, value, chance) in zip(axes, LOCAL_MEASURES, strict=True):
        say_number = percent if value == "position_accuracy" else number
        most = max(getattr(probe, name) for probe in _local_probes(reports) for name in (value, chance)) or 1.0
        for place, report in enumerate(reports):
            for offset, (group, colour) in zip((-0.2, 0.2), GROUPS, strict=True):
                probe = getattr(report.local_information, group)
                if probe is None:
                    axis.text(0, place + offset, " not measured", va="center", fontsize=7, color="#555555")
                    continue
                (bar,) = bars = axis.barh(place + offset, getattr(probe, value), height=0.36, color=colour)
                marks = axis.vlines(getattr(probe, chance), *_span(bar), color=CHANCE, linewidth=2.2)
                inside = bar.get_width() > 0.5 * most
                how = {"label_type": "center", "color": "white"} if inside else {"padding": 4}
                axis.bar_label(bars, [say_number(bar.get_width())], fontsize=8, **how)
                marks.set_gid("chance")
        axis.set_title(title, fontsize=10)
        axis.set(xlabel=unit, xlim=(0, 1.12 * most), ylim=(len(reports) - 0.45, -0.55))
        axis.set_yticks(range(len(reports)), [plain(name) for name in names(reports)], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    percent_axis(axes[0].xaxis)
    chance = line(CHANCE, "best constant answer (chance)")
    legend(figure, [patch(NORMAL, "normal patches"), patch(OUTLIER, "outliers"), chance])
    return figure


def global_information_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Accuracy of image classification from one token alone, by kind of token."""
    most = max(len(report.global_information.tokens) for report in reports)
    figure, axes = panels(
        reports, title="What a single token says about the whole image", height=1.2 + 0.24 * most, share="x"
    )
    for axis, report in zip(axes, reports, strict=True):
        found = report.global_information
        if not found.tokens:
            say(axis, found.why_not or "Not measured.")
            continue
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
    kinds = {"class": CLASS, "register": REGISTER, "outlier": OUTLIER}
    return next((colour for kind, colour in kinds.items() if token.startswith(kind)), NORMAL)


def _density(counts: Sequence[int], lowest: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges in [-1, 1] and a density that integrates to 1, in about `CURVE_POINTS` bins above the lowest similarity."""
    shown = len(counts) * (1 - lowest) / 2
    merged = max(1, int(shown // CURVE_POINTS))
    # Full bins end at 1, where similarities crowd; what does not fill a bin is at -1.
    padded = np.pad(np.array(counts, dtype=float), (-len(counts) % merged, 0)).reshape(-1, merged).sum(axis=1)
    width = 2 * merged / len(counts)
    return 1 - width * np.arange(len(padded), -1, -1), padded / (padded.sum() * width)


def _local_probes(reports: Sequence[ArtifactReport]) -> list[LocalProbe]:
    groups = [group for r in reports for group in (r.local_information.normal, r.local_information.outlier)]
    return [probe for probe in groups if probe is not None]


def _span(bar: Rectangle) -> tuple[float, float]:
    return bar.get_y(), bar.get_y() + bar.get_height()
