"""What probes read of images: class tokens of the last blocks, and means of patches and of registers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.images.source import Batch
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.passes import Needs, failing_together, gathered, in_order, observed
from vitreg_hub.tokens import Observation

LAST_BLOCKS = 4
"""Blocks whose class tokens are kept, as DINOv2's linear probe reads them."""

Pool = Literal["class", "patches", "registers", "class+patches", "class+registers"]
"""What a feature is made of: the class token, the mean of the patches, the mean of the registers, or two of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features of N images, each token after the final norm.

    Attributes:
        indices: [N] int64, of the images in their source.
        labels: [N] int64, -1 where there is none.
        cls: [N, L, D], class tokens of the last L blocks in their order; L is 0 for a model without a class token.
        patches: [N, D], means over the patches of the last block.
        registers: [N, 0 or 1, D], means over the registers of the last block, if there are any.
        logits: [N, C] of the model's own head, where they were asked for; else [N, 0].
    """

    indices: Tensor
    labels: Tensor
    cls: Tensor
    patches: Tensor
    registers: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return type(self)(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def labelled(self) -> Self:
        """Those with a label."""
        return self[self.labels >= 0]

    @property
    def pools(self) -> tuple[Pool, ...]:
        """What can be made of them."""
        registers: tuple[Pool, ...] = ("registers", "class+registers") if self.registers.shape[1] else ()
        found: tuple[Pool, ...] = ("class", "patches", "class+patches", *registers)
        return tuple(pool for pool in found if self.cls.shape[1] or "class" not in pool)

    def pooled(self, pool: Pool, *, blocks: int = 1) -> Tensor:
        """One vector for each image, [N, *].

        Args:
            pool: What it is made of.
            blocks: From how many of the last blocks class tokens are taken, in their order.

        Raises:
            DataError: The model has no such tokens, or fewer blocks.
        """
        if pool not in self.pools or not 1 <= blocks <= max(1, self.cls.shape[1]):
            raise DataError(
                f"the feature {pool} of {blocks} blocks: choose from {', '.join(self.pools)} and at most "
                f"{self.cls.shape[1]} blocks."
            )
        parts = []
        if "class" in pool:
            parts.append(self.cls[:, -blocks:].flatten(1))
        if "patches" in pool:
            parts.append(self.patches)
        if "registers" in pool:
            parts.append(self.registers.flatten(1))
        return torch.cat(parts, dim=1)

    @property
    def default_pool(self) -> Pool:
        """The class token, or the mean of the patches where there is none."""
        return self.pools[0]


def pooled_needs(model: nn.Module, *, blocks: int = LAST_BLOCKS, logits: bool = False) -> Needs:
    """What `pooled_features` reads of an observation."""
    depth = len(VitLayout.of(model).blocks)
    return Needs(normed_blocks=tuple(range(-min(blocks, depth), 0)), logits=logits)


def pooled_features(seen: Observation, batch: Batch, *, dtype: torch.dtype = torch.float32) -> Features:
    """The features of one batch, on the CPU."""
    by_block = [seen.normed_blocks[block] for block in sorted(seen.normed_blocks)]
    last = by_block[-1]
    registers = last.registers.mean(dim=1, keepdim=True) if last.registers.shape[1] else last.registers
    return Features(
        indices=batch.indices,
        labels=torch.full_like(batch.indices, -1) if batch.labels is None else batch.labels,
        cls=torch.cat([tokens.cls[:, :1] for tokens in by_block], dim=1).to("cpu", dtype),
        patches=last.patches.mean(dim=1).to("cpu", dtype),
        registers=registers.to("cpu", dtype),
        logits=seen.logits.to("cpu", dtype) if seen.logits.numel() else torch.empty(len(batch.indices), 0),
    )


def joined(parts: Sequence[Features]) -> Features:
    """Features of several batches, in the order of their images.

    Raises:
        DataError: There are none.
    """
    if not parts:
        raise DataError("there are no images to take features of.")
    columns = in_order({field.name: getattr(part, field.name) for field in fields(part)} for part in parts)
    return Features(**columns)


def extract(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    logits: bool = False,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Features of all images, the same on every process; all must call it, each with its share of the batches.

    Args:
        model: A ViT of timm or transformers.
        batches: From `ImageSource.batches`.
        logits: Also take what the model's own head gives.
        world_size: Number of processes.
        dtype: In which they are kept: (L + 2) x D numbers for each image, and C more with `logits`.

    Raises:
        DataError: An image cannot be used, or the model is not a ViT that can be read, or has no head.
    """
    needs = pooled_needs(model, logits=logits)
    with failing_together(world_size=world_size):
        mine = [pooled_features(seen, batch, dtype=dtype) for seen, batch in observed(model, batches, needs)]
    return joined([part for share in gathered(mine, world_size=world_size) for part in share])
