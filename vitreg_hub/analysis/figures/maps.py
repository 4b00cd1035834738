"""Figures of single images: small pictures of the images and of the maps that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn

from vitreg_hub.analysis.results import Example
from vitreg_hub.any_vit import open_vit
from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import displayable
from vitreg_hub.plotting import OUTLIER, number, plain, png
from vitreg_hub.tokens import observe

COLUMNS = 8
"""Most pictures in a line; further ones continue in the next."""
WIDTH = 1.35
"""Of a picture, in inches."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Map:
    """One small picture.

    Attributes:
        values: [rows, columns] numbers, whose range is given below it, or [height, width, 3] colours in [0, 1].
        outlined: [rows, columns] bool, places with a line around them.
        limits: Values of the darkest and the brightest colour; by default the smallest and the largest of `values`.
    """

    title: str
    values: np.ndarray
    outlined: np.ndarray | None = None
    limits: tuple[float, float] | None = None


def draw_maps(images: Sequence[Sequence[Sequence[Map]]], *, title: str) -> Figure:
    """Draw lines of pictures for each image; long lines continue below.

    Only the pictures of the first image have titles, or all pictures if those of an image fill several lines.
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


def examples_figure(examples: Sequence[Example], *, name: str) -> Figure:
    """Draw, per image, the input, patch norms with outliers outlined, principal components, and attention maps.

    Norms have one colour scale for all images, attention maps one each. Attention is the mean over heads.
    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figures 1 and 9.
    """
    limits = (min(e.norms.min() for e in examples), max(e.norms.max() for e in examples))
    images = []
    for example in examples:
        norms = Map(title="patch norms", values=example.norms, outlined=example.outliers, limits=limits)
        components = Map(title="components", values=example.components)
        maps = [Map(title="input", values=example.image), norms, components, *_attention_maps(example)]
        images.append([maps])
    return draw_maps(images, title=plain(f"Single images: {name}"))


def attention_figure(examples: Sequence[Example], *, heads: bool = False) -> Figure:
    """Draw, per image, what the class token and each register attend to, as a mean over heads.

    Every map has its own colour scale, from the smallest to the largest share of attention, given below it.

    Args:
        heads: Also draw the attention of the class token head by head, or that of the first register if there is no
            class token. Heads are counted from 1.

    Raises:
        DataError: There is neither a class token nor a register.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figures 1 and 9.
    """
    return draw_maps([_attention_lines(example, heads) for example in examples], title="Attention to the patches")


def _attention_maps(example: Example) -> list[Map]:
    """Attention of class token and registers, mean over heads."""
    maps = []
    if example.class_attention is not None:
        maps.append(Map(title="class token", values=example.class_attention.mean(0)))
    for i, attention in enumerate(example.register_attention, start=1):
        maps.append(Map(title=f"register {i}", values=attention.mean(0)))
    return maps


def _attention_lines(example: Example, heads: bool) -> list[list[Map]]:
    maps = _attention_maps(example)
    if not maps:
        raise DataError(
            "the model has neither class token nor registers, so there is no attention to draw; "
            "choose a model that has one of them."
        )
    lines = [[Map(title="input", values=example.image), *maps]]
    if heads:
        name, by_head = "class", example.class_attention
        if by_head is None:
            name, by_head = "register 1", example.register_attention[0]
        lines.append([Map(title=f"{name}, head {i}", values=values) for i, values in enumerate(by_head, start=1)])
    return lines


def token_figure(vit: nn.Module, images: Tensor, *, file: str | Path) -> Path:
    """Draw, per image, the input, the norms of its patch tokens and what the class token and the registers attend to.

    Norms are those after the last block, before the final norm; attention is that of the last block, mean over heads.
    Every map has its own colour scale, from its smallest to its largest value, given below it.

    Args:
        images: [B, C, H, W], normalised as the model expects.
    """
    opened = open_vit(vit)
    seen = observe(vit, images, norms=True, attention=(-1,))
    patch_norms = seen.norms[-1][:, seen.order.num_prefix :].unflatten(1, seen.order.grid).cpu().numpy()
    both = [seen.attention[-1].cls, seen.attention[-1].registers]
    attention = torch.cat(both, dim=2).float().mean(dim=1).cpu().numpy()  # [B, C + R, rows, columns]
    titles = [*(f"class {i}" for i in range(1, seen.order.num_class + 1)), *seen.order.register_names]
    lines = []
    for image, norms, attended in zip(images, patch_norms, attention, strict=True):
        shown = displayable(image, opened.mean, opened.std)
        maps = [Map(title="input", values=shown), Map(title="patch norms", values=norms)]
        lines.append([[*maps, *(Map(title=t, values=v) for t, v in zip(titles, attended, strict=True))]])
    Path(file).write_bytes(png(draw_maps(lines, title="Norms and attention of the last block")))
    return Path(file)
