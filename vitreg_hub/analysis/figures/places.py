"""Figures of where outliers are: in which places of the grid, and in how many of the images."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vitreg_hub.analysis.figures.base import colour_map, panels, say
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.plotting import OUTLIER, percent_axis, whole_numbers

NONE = "No outliers in block {block}."


def location_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """In which share of the images the patch at each place is an outlier; one scale for all models."""
    figure, axes = panels(reports, title="Where outliers are", share="none")
    most = max(share for report in reports for row in report.places.per_position for share in row) or 1
    pictures = []
    for axis, report in zip(axes, reports, strict=True):
        if not report.outlier_fraction[report.block]:
            say(axis, NONE.format(block=report.block))
            continue
        places = np.array(report.places.per_position)
        pictures.append(axis.imshow(places, cmap=colour_map("#ffffff", OUTLIER, "#3d1a00"), vmin=0, vmax=most))
        axis.set(xlabel="column of the grid of patches", ylabel="row")
        axis.spines[:].set_visible(True)
        axis.set_anchor("N")
        whole_numbers(axis.xaxis, 8)
        whole_numbers(axis.yaxis, 8)
    if pictures:
        bar = figure.colorbar(pictures[0], ax=axes, label="share of images with an outlier there", panchor=False)
        percent_axis(bar.ax.yaxis)
    return figure


def outliers_per_image_figure(reports: Sequence[ArtifactReport]) -> Figure:
    """How many images have 0, 1, 2, ... outliers."""
    figure, axes = panels(reports, title="Outliers per image", height=2.6)
    for axis, report in zip(axes, reports, strict=True):
        images = report.places.per_image
        if not report.outlier_fraction[report.block]:
            say(axis, NONE.format(block=report.block))
            continue
        axis.bar(range(len(images)), images, width=0.8 if len(images) < 30 else 1.0, color=OUTLIER)
        axis.set(xlabel=f"outliers in one image after block {report.block}", ylabel="number of images")
        whole_numbers(axis.xaxis)
        whole_numbers(axis.yaxis)
    return figure
