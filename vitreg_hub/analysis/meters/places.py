"""Where outliers are: at which positions, and how many in an image."""

from typing import Self

import numpy as np
from torch import Tensor

from vitreg_hub.analysis.results import OutlierPlaces
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation

SAMPLES = 2000
"""Samples of the pictures, drawn for the interval."""


class PlaceMeter:
    """Counts outliers per position and per image (Darcet et al., appendix on the interpolation of positions)."""

    needs = Needs()

    def __init__(self, *, by_label: bool = False, seed: int = 0) -> None:
        """Set whether images of one label are parts of one picture, for the interval of the share of outliers."""
        self._by_label, self._seed = by_label, seed
        self._pictures: dict[int, np.ndarray] = {}  # images and outliers, by label
        self._num_images = 0
        self._per_position = np.zeros((), dtype=np.int64)  # [rows, columns]
        self._per_image = np.zeros((), dtype=np.int64)  # [patches + 1]

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        marked = outliers.cpu().numpy()
        self._num_images += len(marked)
        self._per_position = self._per_position + marked.sum(0).reshape(seen.order.grid)
        counts = marked.sum(1)
        self._per_image = self._per_image + np.bincount(counts, minlength=marked.shape[1] + 1)
        if self._by_label and labels is not None:
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                self._add(label, np.array([1, count]))

    def merge(self, other: Self) -> None:
        self._num_images += other._num_images
        self._per_position = self._per_position + other._per_position
        self._per_image = self._per_image + other._per_image
        for label, picture in other._pictures.items():
            self._add(label, picture)

    def _add(self, label: int, picture: np.ndarray) -> None:
        self._pictures[label] = self._pictures.get(label, 0) + picture

    def result(self) -> OutlierPlaces:
        """Shares per position, and how many images have 0, 1, 2, ... outliers."""
        shares = self._per_position / self._num_images
        most = int(np.flatnonzero(self._per_image)[-1])
        return OutlierPlaces(
            per_position=tuple(tuple(row) for row in shares.tolist()),
            per_image=tuple(self._per_image[: most + 1].tolist()),
            interval=self._interval() if most else None,
            num_pictures=len(self._pictures) or self._num_images,
        )

    def _interval(self) -> tuple[float, float]:
        """Percentiles of the share of outliers in samples of the pictures, drawn with replacement.

        Patches of a picture are alike, so they do not count as independent. Source: Efron, "Bootstrap methods", 1979.
        """
        if self._pictures:
            kinds = np.array([self._pictures[label] for label in sorted(self._pictures)])
            repeated = np.ones(len(kinds))
        else:  # images with equally many outliers are the same here
            kinds = np.stack([np.ones(len(self._per_image)), np.arange(len(self._per_image))], axis=1)
            repeated = self._per_image
        rng = np.random.default_rng(self._seed)
        number = int(repeated.sum())
        images, outliers = (rng.multinomial(number, repeated / number, size=SAMPLES) @ kinds).T
        shares = outliers / (images * (len(self._per_image) - 1))
        low, high = np.quantile(shares, (0.025, 0.975)).tolist()
        return low, high
