"""Figures of token norms, and of how many tokens are outliers and where."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from vitreg_hub.analysis.meters.histogram import EDGES, edges
from vitreg_hub.analysis.results import ArtifactReport, NormHistogram
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.figures import colour_map, legend, line, panels, patch
from vitreg_hub.pages.wording import percent
from vitreg_hub.plotting import (
    CLASS,
    NORMAL,
    OUTLIER,
    REGISTER,
    log_axis,
    number,
    percent_axis,
    positive_limits,
    whole_numbers,
)

SHOWN_BINS = 160
"""About how many bins a figure has at most: with the 1.1 % of a histogram, norms from 1 to 5.7 fill them."""
NORM = "norm of the token"
BLOCK = "block (the first is 0)"


def norms_by_block_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Norms of patch tokens after every block as a map of densities, with those of class token and registers as lines.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figure 4a.
    """
    figure, axes = panels(names(reports), title="Norms of the tokens after every block", height=3.6, share="y")
    wide = _width([block.histogram for report in reports for block in report.blocks])
    merged = [[_merged(block.histogram, wide) for block in report.blocks] for report in reports]
    first = min(start for blocks in merged for start, counts in blocks if len(counts))
    last = max(start + len(counts) for blocks in merged for start, counts in blocks if len(counts))
    shares = [np.ma.masked_equal([_share(block, first, last) for block in blocks], 0).T for blocks in merged]
    density = LogNorm(min(share.min() for share in shares), 1)
    heights = EDGES[first * wide : last * wide + 1 : wide]
    others = [n for report in reports for b in report.blocks for n in (*b.class_norms, *b.register_norms)]
    low, high = positive_limits([heights[0], heights[-1], *others])
    halo = [withStroke(linewidth=4, foreground="white")]
    colours = colour_map("#e4e4e4", "#333333")
    for axis, report, share in zip(axes, reports, shares, strict=True):
        depth = len(report.blocks)
        axis.pcolormesh(np.arange(depth + 1) - 0.5, heights, share, norm=density, cmap=colours)
        blocks = range(depth)
        for norms in np.array([block.register_norms for block in report.blocks]).T:
            axis.plot(blocks, norms, color=REGISTER, linewidth=1.2, marker=".")
        for norms in np.array([block.class_norms for block in report.blocks]).T:
            axis.plot(blocks, norms, color=CLASS, linewidth=1.8, marker=".")
        medians = [block.quantile(0.5) for block in report.blocks]
        axis.plot(blocks, medians, color=NORMAL, linewidth=2, path_effects=halo, gid="median")
        with_cutoff = [(i, b.cutoff.value) for i, b in enumerate(report.blocks) if b.cutoff.value is not None]
        if with_cutoff:
            at, values = np.array(with_cutoff).T
            axis.hlines(values, at - 0.5, at + 0.5, color=OUTLIER, linewidth=2.2, path_effects=halo)
        axis.set(yscale="log", xlabel=BLOCK, ylabel=NORM, xlim=(-0.5, depth - 0.5), ylim=(low, high))
        whole_numbers(axis.xaxis)
    log_axis(axes[0].yaxis, low, high)
    bar = figure.colorbar(
        ScalarMappable(density, colours), ax=axes, label="share of the block's patch tokens", pad=0.02
    )
    percent_axis(bar.ax.yaxis)
    shown = [line(NORMAL, "median patch")]
    if any(value is not None for report in reports for value in report.cutoff):
        shown.append(line(OUTLIER, "cutoff: outliers lie above"))
    if any(report.model.num_class_tokens for report in reports):
        shown.append(line(CLASS, "class token (mean)"))
    if any(report.model.num_registers for report in reports):
        shown.append(line(REGISTER, "registers (mean of each)"))
    legend(figure, shown)
    return figure


def norm_distribution_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """How the norms of patch tokens are distributed in the chosen block, and the cutoff.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figure 3.
    """
    figure, axes = panels(names(reports), title="Distribution of the norms of the patch tokens")
    spans, wide, most = [], _width([report.chosen.histogram for report in reports]), 1
    for axis, report in zip(axes, reports, strict=True):
        block, cutoff = report.chosen, report.chosen.cutoff.value
        normal, outlier = _split(block.histogram, block.cutoff.norm)
        (start, below), (_, above) = _merged(normal, wide), _merged(outlier, wide)
        at = EDGES[start * wide : (start + len(below)) * wide + 1 : wide]
        spans += [at[0], at[-1]]
        most = max(most, *(below + above))
        axis.bar(at[:-1], below, np.diff(at), align="edge", color=NORMAL)
        axis.bar(at[:-1], above, np.diff(at), bottom=below, align="edge", color=OUTLIER)
        said = percent(block.outlier_fraction) if block.outlier_fraction else "no outliers"
        if cutoff is not None:
            axis.axvline(cutoff, color=OUTLIER, linestyle="--", linewidth=1.2)
            spans.append(cutoff)
            said += f" above {number(cutoff)}"
        # above the panel, where neither bars nor the cutoff are
        axis.text(0.5, 1.02, said, transform=axis.transAxes, ha="center", va="bottom", fontsize=9, color="black")
        axis.set_title(axis.get_title(), fontsize=10, pad=18)
        axis.set(xlabel=f"{NORM} after block {report.block}", ylabel="number of patch tokens")
        axis.set(xscale="log", yscale="log")
    low, high = positive_limits(spans)
    axes[0].set(xlim=(low, high), ylim=(0.7, most * 1.5))
    log_axis(axes[0].xaxis, low, high)
    log_axis(axes[0].yaxis, 0.7, most * 1.5)
    shown = [patch(NORMAL, "normal patches"), patch(OUTLIER, "outliers"), line(OUTLIER, "cutoff", "--")]
    legend(figure, shown if any(r.cutoff[r.block] is not None for r in reports) else shown[:1])
    return figure


def outlier_share_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """Share of the patch tokens that are outliers, block by block, of models that have any."""
    figure, axes = panels(names(reports), title="Share of outliers after every block", height=2.6, share="y")
    for axis, report in zip(axes, reports, strict=True):
        axis.bar(range(len(report.blocks)), report.outlier_fraction, color=OUTLIER)
        axis.set(xlabel=BLOCK, ylabel="share of patch tokens", xlim=(-0.6, len(report.blocks) - 0.4))
        whole_numbers(axis.xaxis)
    percent_axis(axes[0].yaxis)
    axes[0].set_ylim(0, 1.08 * max(share for report in reports for share in report.outlier_fraction) or 1)
    return figure


def location_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """In which share of the images the patch at each place is an outlier; one scale for all models, which have any."""
    figure, axes = panels(names(reports), title="Where outliers are", share="none")
    most = max(share for report in reports for row in report.places.per_position for share in row) or 1
    pictures = []
    for axis, report in zip(axes, reports, strict=True):
        places = np.array(report.places.per_position)
        pictures.append(axis.imshow(places, cmap=colour_map("#ffffff", OUTLIER, "#3d1a00"), vmin=0, vmax=most))
        axis.set(xlabel="column of the grid of patches", ylabel="row")
        axis.spines[:].set_visible(True)
        axis.set_anchor("N")
        whole_numbers(axis.xaxis, 8)
        whole_numbers(axis.yaxis, 8)
    bar = figure.colorbar(pictures[0], ax=axes, label="share of images with an outlier there", panchor=False)
    percent_axis(bar.ax.yaxis)
    return figure


def outliers_per_image_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """How many images have 0, 1, 2, ... outliers, of models that have any."""
    figure, axes = panels(names(reports), title="Outliers per image", height=2.6)
    for axis, report in zip(axes, reports, strict=True):
        images = report.places.per_image
        axis.bar(range(len(images)), images, width=0.8 if len(images) < 30 else 1.0, color=OUTLIER)
        axis.set(xlabel=f"outliers in one image after block {report.block}", ylabel="number of images")
        whole_numbers(axis.xaxis)
        whole_numbers(axis.yaxis)
    return figure


def _width(histograms: Sequence[NormHistogram]) -> int:
    """How many bins of the histograms make one of a figure that shows them all."""
    filled = [histogram for histogram in histograms if histogram.counts]
    first = min((histogram.first_bin for histogram in filled), default=0)
    last = max((histogram.first_bin + len(histogram.counts) for histogram in filled), default=1)
    return max(1, -(-(last - first) // SHOWN_BINS))


def _merged(histogram: NormHistogram, wide: int) -> tuple[int, np.ndarray]:
    """The counts in bins that are this many times wider: the index of the first bin, and the counts."""
    start, lead = divmod(histogram.first_bin, wide)
    tail = -(lead + len(histogram.counts)) % wide
    return start, np.pad(np.array(histogram.counts, dtype=int), (lead, tail)).reshape(-1, wide).sum(axis=1)


def _share(merged: tuple[int, np.ndarray], first: int, last: int) -> np.ndarray:
    start, counts = merged
    return np.pad(counts, (start - first, last - start - len(counts))) / max(1, counts.sum())


def _split(histogram: NormHistogram, cutoff: float) -> tuple[NormHistogram, NormHistogram]:
    """Counts below and above a cutoff; the bin that holds it goes where its middle is."""
    counts, at = np.array(histogram.counts, dtype=int), edges(histogram)
    above = np.sqrt(at[:-1] * at[1:]) > cutoff
    low, high = (tuple(np.where(side, counts, 0).tolist()) for side in (~above, above))
    return replace(histogram, counts=low), replace(histogram, counts=high)
