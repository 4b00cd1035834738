"""What is known of a picture beyond its class: masks, depths and boxes, as they are stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import open_picture

INTEGERS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's kinds of pictures whose pixels are whole numbers."""


def read_mask(value: Any, *, within: str | None = None) -> np.ndarray:
    """The class of each pixel, [H, W] int64: of a palette or grey picture, or of an array.

    Args:
        value: A row's ``{"bytes", "path"}``, a path (also of a .npy file), a picture, or an array.
        within: As in `pictures.read_rgb`.

    Raises:
        ValueError: It does not hold one whole number for each pixel.
    """
    pixels = _pixels(value, within)
    if pixels.ndim != 2 or pixels.dtype.kind not in "uib":
        raise ValueError(
            f"a mask has the number of a class for each pixel, so save it as a palette or grey PNG, "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels.astype(np.int64)


def read_depth(value: Any, *, scale: float | None = None, within: str | None = None) -> np.ndarray:
    """The depth of each pixel in metres, [H, W] float32, 0 where it is unknown (0, negative or not finite).

    Args:
        value: As in `read_mask`. Floating-point numbers are metres.
        scale: Units of whole numbers in a metre: 1000 for millimetres (NYUv2), 256 for KITTI.
        within: As in `pictures.read_rgb`.

    Raises:
        ValueError: There is not one number for each pixel.
        DataError: The depths are whole numbers without scale.
    """
    pixels = _pixels(value, within)
    if pixels.ndim != 2 or pixels.dtype.kind not in "uif":
        raise ValueError(
            f"a depth has one number for each pixel, so save it as a PNG of 16 bits, not {pixels.dtype} "
            f"{list(pixels.shape)}"
        )
    if pixels.dtype.kind != "f":
        if scale is None:
            raise DataError(
                "depths are whole numbers, and how many of them are a metre is unknown: give depth_scale, such as 1000 "
                "for millimetres or 256 for KITTI."
            )
        pixels = pixels / scale
    depth = pixels.astype(np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _pixels(value: Any, within: str | None) -> np.ndarray:
    if isinstance(value, str | Path) and str(value).lower().endswith(".npy"):
        return np.array(np.load(value, mmap_mode="r", allow_pickle=False))  # mapped, since a header may claim any size
    if isinstance(value, str | Path | dict):
        value = open_picture(value, within=within)
    if isinstance(value, Image.Image) and value.mode not in (*INTEGERS, "F"):
        raise ValueError(f"its pixels are colours ({value.mode})")
    return np.asarray(value)


def read_boxes(value: Any, *, sizes: bool = False) -> np.ndarray:
    """Boxes of a row, [K, 4] float32: left, top, right and bottom edge in pixels.

    Args:
        value: A list of four numbers for each box, or None for none.
        sizes: The last two of the numbers are width and height, as in COCO.

    Raises:
        ValueError: They are no such numbers, or a box has no size.
    """
    boxes = np.asarray([] if value is None else value, dtype=np.float32)
    boxes = boxes.reshape(0, 4) if not boxes.size else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"boxes are lists of four numbers each, not {boxes.dtype} {list(boxes.shape)}")
    if sizes:
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        empty = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)][0].tolist()
        raise ValueError(f"the box {empty} ends before it begins: boxes are left, top, right, bottom")
    return boxes


def part(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, where ``objects.bbox`` is the part of a column, however `datasets` holds it."""
    column, _, inner = column.partition(".")
    value = row.get(column)
    if not inner or value is None:
        return value
    return value.get(inner) if isinstance(value, Mapping) else [entry.get(inner) for entry in value]
