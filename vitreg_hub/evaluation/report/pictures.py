"""Pictures with what models told of them: classes of pixels, depth, or boxes, beside the truth."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from vitreg_hub.evaluation.dense.scoring import Example
from vitreg_hub.evaluation.report.words import WORDS
from vitreg_hub.evaluation.results import Protocol
from vitreg_hub.pages.figures import legend, line, patch
from vitreg_hub.plotting import CLASS, OUTLIER, number, plain

WIDTH = 2.1
"""Of a picture, in inches."""
EDGE = withStroke(linewidth=3.5, foreground="white")
"""Makes boxes visible on any picture."""
MOST_NAMES = 40
"""Most classes in a legend."""


def examples_figure(protocol: Protocol, by_model: Mapping[str, Sequence[Example]], classes: Sequence[str]) -> Figure:
    """Pictures in true colours, the truth, and what each model told; a row per picture.

    Args:
        protocol: segmentation, depth or discovery.
        by_model: The pictures of each model; those of one name are the same picture.
        classes: Names of the classes of pixels.
    """
    pictures = {example.name: example for examples in by_model.values() for example in examples}
    heads = ("picture", "truth", *by_model)
    tallest = max(example.image.height / example.image.width for example in pictures.values())
    height = WIDTH * min(2.0, max(0.5, tallest)) + 0.2
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0.01, wspace=0.01)
    figure = Figure(figsize=(WIDTH * len(heads), height * len(pictures) + 0.9), layout=layout)
    figure.suptitle(f"{WORDS[protocol][0]}: single pictures", fontsize=12)
    axes = figure.subplots(len(pictures), len(heads), squeeze=False)
    painters: dict[Protocol, Callable[[Axes, Example, np.ndarray], None]] = {
        "segmentation": partial(_draw_classes, num_classes=len(classes)),
        "depth": _draw_depth,
        "discovery": _draw_boxes,
    }
    for row, shown in zip(axes, pictures.values(), strict=True):
        same = [next((e for e in examples if e.name == shown.name), None) for examples in by_model.values()]
        row[0].imshow(shown.image)
        row[0].set_ylabel(plain(shown.name if len(shown.name) < 24 else f"…{shown.name[-22:]}"), fontsize=7)
        for axis, found in zip(row[1:], [shown.truth, *(e and e.predicted for e in same)], strict=True):
            axis.set_visible(found is not None)
            if found is not None:
                painters[protocol](axis, shown, found)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_visible(True)
        axis.set_title(plain(head if len(head) < 25 else f"…{head[-23:]}"), fontsize=8.5)
    handles: list[Artist] = []
    if protocol == "discovery":
        handles = [line(CLASS, "true", "--"), line(OUTLIER, "predicted")]
    elif protocol == "segmentation":
        maps = [e.truth for e in pictures.values()] + [e.predicted for one in by_model.values() for e in one]
        occur = sorted({int(i) for found in maps for i in np.unique(found) if 0 <= i < len(classes)})
        colours = class_colours(len(classes)) / 255
        handles = [patch(to_hex(colours[i]), plain(classes[i])) for i in occur[:MOST_NAMES]]
    if handles:
        legend(figure, handles)
    return figure


def class_colours(number: int) -> np.ndarray:
    """Colours of classes of pixels, [C, 3] in 0..255.

    Source: the colour map of Pascal VOC's development kit.
    """
    classes = np.arange(number)
    colours = np.zeros((number, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((classes >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def _draw_classes(axis: Axes, shown: Example, found: np.ndarray, *, num_classes: int) -> None:
    counted = (shown.truth >= 0) & (shown.truth < num_classes)
    pixels = np.full((*found.shape, 3), 255, dtype=np.uint8)
    pixels[counted] = class_colours(max(num_classes, int(found.max()) + 1))[found[counted]]
    axis.imshow(pixels, interpolation="nearest")


def _draw_depth(axis: Axes, shown: Example, found: np.ndarray) -> None:
    truth = shown.truth[shown.truth > 0]
    low, high = (truth.min(), truth.max()) if truth.size else (0, 1)
    known = np.ma.masked_less_equal(found, 0)
    axis.imshow(known, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    if known.count():
        axis.set_xlabel(f"{number(known.min())} to {number(known.max())} m", fontsize=7)


def _draw_boxes(axis: Axes, shown: Example, found: np.ndarray) -> None:
    axis.imshow(shown.image)
    kinds = [(shown.truth, CLASS, "--")] + ([] if found is shown.truth else [(found, OUTLIER, "-")])
    for boxes, colour, line_style in kinds:
        style = {"edgecolor": colour, "linestyle": line_style, "linewidth": 2, "path_effects": [EDGE]}
        for left, top, right, bottom in np.reshape(boxes, (-1, 4)):
            axis.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, **style))
