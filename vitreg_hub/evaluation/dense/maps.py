"""Maps of values for every pixel of a picture: how they are paired, and how they change their size."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitreg_hub.errors import DataError

Maps = Tensor | np.ndarray | Iterable[Tensor | np.ndarray]
"""One map [H, W], several of one size [B, H, W] or [B, 1, H, W], or any number of maps of any sizes."""


def pairs(predictions: Maps, targets: Maps) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each prediction [H, W] with its target [H, W].

    Raises:
        DataError: Their numbers or sizes differ, or one is no map.
    """
    for index, (prediction, target) in enumerate(zip_longest(_maps(predictions), _maps(targets))):
        if prediction is None or target is None:
            more, fewer = ("predictions", "truths") if target is None else ("truths", "predictions")
            raise DataError(f"there are more {more} than {fewer}, which have {index} maps: give one for each image.")
        if prediction.shape != target.shape:
            raise DataError(
                f"prediction {index} has {_size(prediction)} pixels and its truth {_size(target)}: resize the "
                "prediction."
            )
        yield prediction, target


def _maps(values: Maps) -> Iterator[Tensor]:
    if isinstance(values, Tensor | np.ndarray) and values.ndim == 2:
        values = [values]
    for index, value in enumerate(values):
        value = torch.as_tensor(value)
        if value.ndim == 3 and len(value) == 1:
            value = value[0]
        if value.ndim != 2:
            raise DataError(f"map {index} has the shape {list(value.shape)}: give [height, width] for each image.")
        yield value


def _size(value: Tensor) -> str:
    return " x ".join(str(side) for side in value.shape)


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, H, W] bilinearly, corners not aligned, as the official protocols do; unchanged at its own size."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=False)
