"""Where outliers are: at which positions, and how many in an image."""

from typing import Self

import numpy as np
from torch import Tensor

from vitreg_hub.analysis.results import OutlierPlaces
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation


class PlaceMeter:
    """Counts outliers per position and per image (Darcet et al., appendix on the interpolation of positions)."""

    needs = Needs()

    def __init__(self) -> None:
        self._num_images = 0
        self._per_position = np.zeros((), dtype=np.int64)  # [rows, columns]
        self._per_image = np.zeros((), dtype=np.int64)  # [patches + 1]

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        marked = outliers.cpu().numpy()
        self._num_images += len(marked)
        self._per_position = self._per_position + marked.sum(0).reshape(seen.order.grid)
        self._per_image = self._per_image + np.bincount(marked.sum(1), minlength=marked.shape[1] + 1)

    def merge(self, other: Self) -> None:
        self._num_images += other._num_images
        self._per_position = self._per_position + other._per_position
        self._per_image = self._per_image + other._per_image

    def result(self) -> OutlierPlaces:
        """Shares per position, and how many images have 0, 1, 2, ... outliers."""
        shares = self._per_position / self._num_images
        most = int(np.flatnonzero(self._per_image)[-1])
        return OutlierPlaces(
            per_position=tuple(tuple(row) for row in shares.tolist()),
            per_image=tuple(self._per_image[: most + 1].tolist()),
        )
