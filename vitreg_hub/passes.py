"""One pass of a ViT over images: every image once, batch by batch, shared by all processes."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from vitreg_hub.any_vit import AnyVit
from vitreg_hub.errors import DataError
from vitreg_hub.images.source import Batch, ImageSource
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.tokens import Observation, observe

Share = TypeVar("Share")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What is read of an observation besides its order; the fields are arguments of `observe`."""

    norms: bool = False
    normed: bool = False
    normed_blocks: tuple[int, ...] = ()
    embedded: bool = False
    attention: tuple[int, ...] = ()
    logits: bool = False
    projections: tuple[int, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            norms=self.norms or other.norms,
            normed=self.normed or other.normed,
            normed_blocks=tuple({*self.normed_blocks, *other.normed_blocks}),
            embedded=self.embedded or other.embedded,
            attention=tuple({*self.attention, *other.attention}),
            logits=self.logits or other.logits,
            projections=tuple({*self.projections, *other.projections}),
        )


def require_sensible(options: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that would be ignored, or fail after hours.

    Raises:
        DataError: One is not known, the seed is negative, or the device is not there.
    """
    if unknown := sorted(options.keys() - set(known)):
        raise DataError(f"there is no option {', '.join(unknown)}: choose from {', '.join(known)}.")
    seed = options.get("seed", 0)
    if not 0 <= seed < 2**63:
        raise DataError(f"seed is {seed}: give a whole number of at least 0.")
    try:
        torch.empty(0, device=options.get("device"))
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"device {options.get('device')!r} cannot be used here: give cpu, or cuda with a GPU."
        ) from error


def require_channels(vit: AnyVit, source: ImageSource) -> None:
    """Refuse images of other channels than the model takes.

    Raises:
        DataError: They are, and cannot be made into them.
    """
    channels, tensors = vit.in_chans, isinstance(source.rows, Tensor)
    if channels != (source.rows.shape[1] if tensors else 3) and (tensors or channels != 1):
        given = f"tensors of {source.rows.shape[1]}" if tensors else "pictures of 3"
        raise DataError(
            f"{vit.name} takes images of {channels} channels, but these are {given}: give a tensor "
            f"[N, {channels}, H, W] of numbers that the model takes as they are."
        )


def observed(model: nn.Module, batches: Iterable[Batch], needs: Needs) -> Iterator[tuple[Observation, Batch]]:
    """Yield each batch with its images on the model's device, all else on the CPU, and what the network shows of it.

    Args:
        model: A ViT of timm or transformers, on the device where it is to run. It is not changed.
        needs: What is to be seen. If it is nothing, the network does not run, and there is no observation to read.

    Raises:
        DataError: An image cannot be used, or the model is not a ViT that can be read.
    """
    device = VitLayout.of(model).embedding.weight.device
    for batch in batches:
        batch = replace(batch, images=batch.images.to(device))
        seen: Any = observe(model, batch.images, **asdict(needs)) if needs != Needs() else None
        yield seen, batch


def gathered(mine: Share, *, world_size: int) -> list[Share]:
    """What every process has, in the order of their ranks; all must call it. It is pickled on its way."""
    shares: list[Any] = [mine] * world_size
    if world_size > 1:
        distributed.all_gather_object(shares, mine)
    return shares


@contextmanager
def failing_together(*, world_size: int) -> Iterator[None]:
    """Raise a DataError of one process in all of them, since the others would wait for it forever; all must enter."""
    mine = None
    try:
        yield
    except DataError as error:
        mine = error
    for error in gathered(mine, world_size=world_size):
        if error is not None:
            raise error


def in_order(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the columns [B, *] of batches, sorted by the one called `indices`; empty without batches."""
    parts = list(parts)
    if not parts:
        return {}
    order = torch.cat([part["indices"] for part in parts]).argsort()
    return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
