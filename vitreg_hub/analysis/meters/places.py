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
        self._per_position = np.empty(0)  # [rows, columns]
        self._per_image = np.empty(0)  # [patches + 1]

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        """Add a batch; outliers [B, P]."""
        marked = outliers.cpu().numpy()
        per_image = np.bincount(marked.sum(1), minlength=marked.shape[1] + 1)
        self._add(len(marked), marked.sum(0).reshape(seen.order.grid), per_image)

    def merge(self, other: Self) -> None:
        """Add what another process saw."""
        if other._num_images:
            self._add(other._num_images, other._per_position, other._per_image)

    def _add(self, num_images: int, per_position: np.ndarray, per_image: np.ndarray) -> None:
        self._per_position = self._per_position + per_position if self._num_images else per_position
        self._per_image = self._per_image + per_image if self._num_images else per_image
        self._num_images += num_images

    def result(self) -> OutlierPlaces:
        """Shares per position, and how many images have 0, 1, 2, ... outliers."""
        shares = self._per_position / self._num_images
        most = int(np.flatnonzero(self._per_image)[-1])
        return OutlierPlaces(
            per_position=tuple(tuple(row) for row in shares.tolist()),
            per_image=tuple(self._per_image[: most + 1].tolist()),
        )
