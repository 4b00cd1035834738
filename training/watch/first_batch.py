"""A figure of the first batch of a run, after augmentation."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vitreg_hub.files import whole_file
from vitreg_hub.images.pictures import displayable
from vitreg_hub.plotting import plain, png
from vitreg_hub.training.tasks.base import Batch

MOST_IMAGES = 8
CELL, GAP, MARGIN, HEAD, FOOT = 1.5, 0.1, 0.12, 0.45, 0.45
"""Side of an image's cell, the gap between two, and the margins, in inches."""
ABOVE = 0.3
"""Room for text above a row of several views, in inches; beside a single view there is that of two cells."""
LETTERS = 16
"""Letters of text that fit above one cell."""


def draw_first_batch(
    batch: Batch,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    file: str | Path,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Write `first_batch_figure` to a PNG, replacing an old one.

    Raises:
        BundleError: The file cannot be written.
    """
    figure = first_batch_figure(batch, mean=mean, std=std, label_names=label_names)
    with whole_file(Path(file), replace=True) as target:
        target.write_bytes(png(figure))
    return Path(file)


def first_batch_figure(
    batch: Batch, *, mean: Sequence[float], std: Sequence[float], label_names: Sequence[str] | None = None
) -> Figure:
    """Draw up to eight images, one per row, with their views side by side, without their normalisation.

    Above each row, or beside a single view, is the image's caption, label or name; below the last row are the sizes of
    the views.
    """
    rows, columns = min(len(batch.crops[0]), MOST_IMAGES), len(batch.crops)
    single = columns == 1
    row_height = CELL + GAP + (0 if single else ABOVE)
    width = 2 * MARGIN + (columns + (2 if single else 0)) * (CELL + GAP) - GAP
    height = HEAD + rows * row_height + FOOT
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))  # one axis in inches for all images: one for each would take seconds to draw
    axis.text(width / 2, HEAD / 2, f"First batch (step {batch.step + 1})", ha="center", va="center", fontsize=11)
    lefts = [MARGIN + view * (CELL + GAP) for view in range(columns)]
    for row in range(rows):
        top = HEAD + row * row_height + (0 if single else ABOVE)
        for left, crops in zip(lefts, batch.crops, strict=True):
            scale = CELL / max(crops.shape[-2:])
            extent = (left, left + crops.shape[-1] * scale, top + crops.shape[-2] * scale, top)
            axis.imshow(displayable(crops[row], mean, std), extent=extent, interpolation="nearest")
        text = _text(batch, row, label_names)
        if single:
            axis.text(lefts[0] + CELL + GAP, top + CELL / 2, _fitted(text, 2 * LETTERS, 8), va="center", fontsize=8)
        else:
            axis.text(lefts[0], top - 0.04, _fitted(text, LETTERS * columns, 2), va="bottom", fontsize=8)
    for view, (left, crops) in enumerate(zip(lefts, batch.crops, strict=True), start=1):
        size = f"view {view}\n{crops.shape[-2]} x {crops.shape[-1]}"
        axis.text(left + CELL / 2, height - FOOT, size, ha="center", va="top", fontsize=8)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    return figure


def _fitted(text: str, width: int, lines: int) -> str:
    return plain(textwrap.fill(" ".join(text.split()), width, max_lines=lines, placeholder=" …"))


def _text(batch: Batch, row: int, label_names: Sequence[str] | None) -> str:
    if batch.texts is not None:
        return batch.texts[row]
    if batch.labels is None or (label := int(batch.labels[row])) < 0:
        return batch.names[row]
    return label_names[label] if label_names else f"class {label}"
