"""Where the attention of the class token and of the registers goes."""

from typing import Self

import torch
from torch import Tensor

from vitreg_hub.analysis.results import AttentionMass
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation, TokenOrder


class AttentionMeter:
    """Adds up the attention that class tokens and registers pay to groups of tokens, as a mean over heads and images.

    Darcet et al. show that class attention goes to outliers where there are no registers (section 1, figures 1 and 2)
    and to registers where there are (section 3.4); these are the numbers behind such maps.
    """

    def __init__(self, block: int) -> None:
        self.needs = Needs(attention=(block,))
        self._block = block
        self._num_images = 0
        self._order = TokenOrder()
        self._sums = torch.zeros((), dtype=torch.float64)  # [prefix, 4]

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        order = seen.order
        rows = seen.attention[self._block].weights[:, :, : order.num_prefix].float().mean(1)  # [B, prefix, N]
        to_patches = rows[:, :, order.num_prefix :]
        marked = outliers[: len(rows), None].to(rows.device)
        groups = [
            rows[:, :, : order.num_class].sum(-1),
            rows[:, :, order.num_class : order.num_prefix].sum(-1),
            (to_patches * ~marked).sum(-1),
            (to_patches * marked).sum(-1),
        ]
        self._order = order
        self._num_images += len(rows)
        self._sums = self._sums + torch.stack(groups, dim=-1).cpu().double().sum(0)

    def merge(self, other: Self) -> None:
        self._order = other._order if other._num_images else self._order
        self._num_images += other._num_images
        self._sums = self._sums + other._sums

    def result(self) -> tuple[AttentionMass, ...]:
        """One entry per class token and register; none for a model that has neither."""
        names = (*self._order.class_names, *self._order.register_names)
        shares = (self._sums / self._num_images).tolist()
        return tuple(
            AttentionMass(source=name, to_class=to[0], to_registers=to[1], to_normal=to[2], to_outliers=to[3])
            for name, to in zip(names, shares, strict=True)
        )
