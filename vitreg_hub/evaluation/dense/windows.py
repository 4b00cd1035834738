"""A picture larger than a network takes is cut into overlapping windows, whose predictions are averaged."""

from collections.abc import Callable

import torch
from torch import Tensor

from vitreg_hub.errors import DataError

TOGETHER = 8
"""Windows that are predicted at once."""


def corners(size: tuple[int, int], *, crop: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """Top and left of windows of `crop` pixels that cover a picture; the last ones are moved inside, not padded."""
    starts = []
    for side, window in zip(size, crop, strict=True):
        count = max(side - window + stride - 1, 0) // stride + 1
        starts.append([min(place * stride, side - window) for place in range(count)])
    return [(top, left) for top in starts[0] for left in starts[1]]


def by_windows(predict: Callable[[Tensor], Tensor], images: Tensor, *, crop: int, stride: int | None) -> Tensor:
    """Mean [B, C, H, W] of what is predicted for overlapping windows of images.

    Source: dinov3/eval/segmentation/inference.py. A side that is shorter than the window shortens it; where both are,
    windows are squares of the shorter one.

    Args:
        predict: Gives [N, C, height, width] for windows [N, 3, height, width].
        images: [B, 3, H, W].
        crop: Side of the windows in pixels.
        stride: Pixels from one window to the next; two thirds of `crop` by default, as officially (341 of 512).

    Raises:
        DataError: The numbers make no sense.
    """
    stride = crop * 2 // 3 if stride is None else stride
    if not 1 <= stride <= crop:
        raise DataError(
            f"crop is {crop} and stride is {stride}: give 1 <= stride <= crop, or pixels would be left out."
        )
    height, width = images.shape[-2:]
    if max(height, width) < crop:
        crop = min(height, width)
    rows, columns = min(crop, height), min(crop, width)
    places = corners((height, width), crop=(rows, columns), stride=stride)
    cut = [(slice(top, top + rows), slice(left, left + columns)) for top, left in places]
    total, count = None, images.new_zeros(height, width)
    for start in range(0, len(cut), TOGETHER):
        some = cut[start : start + TOGETHER]
        predicted = predict(torch.cat([images[..., down, right] for down, right in some]))
        if total is None:
            total = predicted.new_zeros(len(images), predicted.shape[1], height, width)
        for (down, right), window in zip(some, predicted.split(len(images)), strict=True):
            total[..., down, right] += window
            count[down, right] += 1
    assert total is not None  # there is at least one window
    return total / count.to(total)
