"""Keeps what a few images look like inside a model, for pictures."""

from collections.abc import Collection
from typing import Self

import torch
from torch import Tensor

from vitreg_hub.analysis.examples import Example
from vitreg_hub.analysis.meters.pca import pca_maps
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation, TokenOrder


class ExampleMeter:
    """Keeps the maps of chosen images.

    Args:
        block: Block whose norms and attention are shown.
        chosen: Indices of the images in the data set.
    """

    def __init__(self, *, block: int, chosen: Collection[int]) -> None:
        self.needs = Needs(normed=True, attention=(block,))
        self._block, self._chosen = block, frozenset(chosen)
        self._order = TokenOrder()
        self._kept: dict[int, dict[str, Tensor]] = {}

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        """Add a batch; outliers [B, P]."""
        self._order = seen.order
        attention = seen.attention[self._block]
        for i, index in enumerate(indices.tolist()):
            if index in self._chosen:
                maps = {
                    "image": displayable(seen.images[i]),
                    "norms": seen.norms[self._block, i, seen.order.num_prefix :].unflatten(0, seen.order.grid),
                    "outliers": outliers[i].unflatten(0, seen.order.grid),
                    "cls": attention.cls[i].float().transpose(0, 1),  # [C, H, rows, columns]
                    "registers": attention.registers[i].float().transpose(0, 1),
                    "patches": seen.normed.patches[i].float(),
                }
                self._kept[index] = {name: value.cpu().clone() for name, value in maps.items()}

    def merge(self, other: Self) -> None:
        """Add what another process saw."""
        if other._kept:
            self._order = other._order
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


def displayable(image: Tensor) -> Tensor:
    """[3, height, width] of any range -> [height, width, 3] in [0, 1], the darkest value 0 and the brightest 1."""
    image = image.float()
    low, high = torch.aminmax(image)
    return ((image - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0)
