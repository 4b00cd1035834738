"""Keeps what the model makes of a few images, for pictures."""

from collections.abc import Collection, Sequence
from typing import Self

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from vitreg_hub.analysis.results import Example
from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import displayable
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation, TokenOrder

QUANTILES = (0.01, 0.99)
"""Shares of the patches below full darkness and full brightness, so that single outliers do not flatten the rest."""
SMALLEST_VARIANCE = 1e-12
"""Relative to the first component; what varies less is float32 rounding."""


class ExampleMeter:
    """Keeps the maps of chosen images."""

    def __init__(
        self,
        *,
        block: int,
        chosen: Collection[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.needs = Needs(normed=True, attention=(block,))
        self._mean, self._std = mean, std
        self._block, self._chosen = block, frozenset(chosen)
        self._order = TokenOrder()
        self._kept: dict[int, dict[str, Tensor]] = {}

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        self._order = seen.order
        attention = seen.attention[self._block]
        for i, index in enumerate(indices.tolist()):
            if index in self._chosen:
                maps = {
                    "image": torch.from_numpy(displayable(seen.images[i], self._mean, self._std)),
                    "norms": seen.norms[self._block, i, seen.order.num_prefix :].unflatten(0, seen.order.grid),
                    "outliers": outliers[i].unflatten(0, seen.order.grid),
                    "cls": attention.cls[i].float().transpose(0, 1),  # [C, H, rows, columns]
                    "registers": attention.registers[i].float().transpose(0, 1),
                    "patches": seen.normed.patches[i].float(),
                }
                self._kept[index] = {name: value.cpu().clone() for name, value in maps.items()}

    def merge(self, other: Self) -> None:
        self._order = other._order if other._kept else self._order
        self._kept = self._kept | other._kept

    def result(self) -> tuple[Example, ...]:
        """The images' maps, in the order of their indices."""
        if not self._kept:
            return ()
        maps = [self._kept[index] for index in sorted(self._kept)]
        components = pca_maps(torch.stack([kept["patches"] for kept in maps]), self._order.grid)
        return tuple(
            Example(
                image=kept["image"].numpy(),
                norms=kept["norms"].numpy(),
                outliers=kept["outliers"].numpy(),
                class_attention=kept["cls"][0].numpy() if self._order.num_class else None,
                register_attention=kept["registers"].numpy(),
                components=colours,
            )
            for kept, colours in zip(maps, components, strict=True)
        )


def pca_maps(patches: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Show each patch by the first three principal components of its token, as red, green and blue.

    One decomposition is fitted to the patches of all images together; thus equal colours mean similar tokens, also in
    different images. Each component is scaled on its own, between `QUANTILES`; its sign makes its largest loading
    positive. A component in which the tokens do not differ is 0.5 everywhere.

    Args:
        patches: [B, P, D], row by row.
        grid: Rows and columns, P in all.

    Returns:
        [B, rows, columns, 3] in [0, 1], float32.

    Raises:
        DataError: The patches do not fill the grid, or hold values that are not finite.

    Source: Oquab et al., "DINOv2", 2023, figure 1, which leaves out the background by a threshold; this does not.
    """
    num_images, num_patches, channels = patches.shape
    if num_patches != grid[0] * grid[1]:
        raise DataError(
            f"{num_patches} patches do not fill a grid of {grid[0]} x {grid[1]}; give the model's own grid."
        )
    tokens = patches.detach().cpu().double().numpy().reshape(-1, channels)
    if not np.isfinite(tokens).all():
        raise DataError("tokens are not finite, so they have no principal components; run the model in float32.")
    scaled = np.full((len(tokens), 3), 0.5)
    if (tokens != tokens[0]).any():
        pca = PCA(n_components=min(3, *tokens.shape), svd_solver="covariance_eigh").fit(tokens)
        varies = pca.explained_variance_ > SMALLEST_VARIANCE * pca.explained_variance_[0]
        scores = pca.transform(tokens)[:, varies]
        low, high = np.quantile(scores, QUANTILES, axis=0)
        spread = np.where(high > low, high - low, 1.0)
        scaled[:, : scores.shape[1]] = np.where(high > low, (scores - low) / spread, 0.5).clip(0, 1)
    return scaled.reshape(num_images, *grid, 3).astype(np.float32)
