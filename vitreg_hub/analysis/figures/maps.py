"""Small pictures in lines and columns: images and the maps that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitreg_hub.plotting import OUTLIER, number

COLUMNS = 8
"""Most pictures in a line; more go on in the next one."""
WIDTH = 1.35
"""Of a picture, in inches."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Map:
    """One small picture.

    Attributes:
        title: Stands above it.
        values: [rows, columns] numbers, whose range stands below it, or [height, width, 3] colours in [0, 1].
        outlined: [rows, columns] bool, places with a line around them.
        limits: Numbers that are darkest and brightest; by default the smallest and the largest of `values`.
    """

    title: str
    values: np.ndarray
    outlined: np.ndarray | None = None
    limits: tuple[float, float] | None = None


def draw_maps(images: Sequence[Sequence[Sequence[Map]]], *, title: str) -> Figure:
    """Draw, per image, lines of pictures; lines that are too long go on below.

    Titles stand above the pictures of the first image, or above all where those of one image fill several lines.
    """
    wrapped = [
        [list(line[start : start + COLUMNS]) for line in lines for start in range(0, len(line), COLUMNS)]
        for lines in images
    ]
    lines = [line for image in wrapped for line in image]
    columns = max(len(line) for line in lines)
    one_line = len(wrapped[0]) == 1
    rows, cols = lines[0][0].values.shape[:2]
    height = WIDTH * min(2.5, max(0.4, rows / cols)) + (0.22 if one_line else 0.42)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0.01, wspace=0.01)
    figure = Figure(figsize=(max(3.2, WIDTH * columns), height * len(lines) + 0.7), layout=layout)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for index, (row, line) in enumerate(zip(axes, lines, strict=True)):
        for axis, picture in zip(row, line, strict=False):
            limits = picture.limits or (None, None)
            axis.imshow(picture.values, cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if picture.values.ndim == 2:
                axis.set_xlabel(f"{number(picture.values.min())} to {number(picture.values.max())}", fontsize=7)
            if picture.outlined is not None:
                axis.add_collection(LineCollection(list(outline(picture.outlined)), colors=OUTLIER, linewidths=1.1))
            if index == 0 or not one_line:
                axis.set_title(picture.title, fontsize=8.5, pad=3)
        for axis in row[len(line) :]:
            axis.remove()
    return figure


def outline(mask: np.ndarray) -> np.ndarray:
    """Lines between the places inside and outside of a mask [rows, columns]: [lines, 2 ends, (x, y)]."""
    padded = np.pad(mask, 1)
    rows, cols = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([np.stack([cols, rows - 1], -1), np.stack([cols, rows], -1)], 1)
    rows, cols = np.nonzero(padded[1:] != padded[:-1])
    level = np.stack([np.stack([cols - 1, rows], -1), np.stack([cols, rows], -1)], 1)
    return np.concatenate([upright, level]) - 0.5
