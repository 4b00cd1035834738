"""One pass of a ViT over images: every image once, batch by batch, shared by all processes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from vitreg_hub.errors import DataError
from vitreg_hub.images.source import Batch, ImageSource, Transform
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.tokens import Observation, observe

Work = TypeVar("Work")


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What a meter reads of an observation besides its order; the fields are arguments of `observe`."""

    norms: bool = False
    blocks: tuple[int, ...] = ()
    normed: bool = False
    embedded: bool = False
    attention: tuple[int, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            norms=self.norms or other.norms,
            blocks=tuple({*self.blocks, *other.blocks}),
            normed=self.normed or other.normed,
            embedded=self.embedded or other.embedded,
            attention=tuple({*self.attention, *other.attention}),
        )


class Meter(Protocol):
    """Adds up what it sees, batch by batch, and merges what several processes saw.

    A meter is pickled to reach other processes, so `__getstate__` leaves out what only `update` needs, such as a model.
    What it finds should not depend, beyond rounding, on how the images are cut into batches and shares.
    """

    @property
    def needs(self) -> Needs:
        """What it reads of an observation."""
        ...

    def update(self, seen: Observation, batch: Batch) -> None:
        """Add a batch.

        Args:
            seen: What the network showed of the images. Meters that need nothing do not read it.
            batch: The images, on the network's device; all else in it is on the CPU.
        """

    def merge(self, other: Self) -> None:
        """Add what another process saw."""


AnyMeter = TypeVar("AnyMeter", bound=Meter)


class PerImage:
    """Keeps something of every image, in the order of the images. Only here does memory grow with their number.

    Args:
        read: Takes an observation and its batch; returns columns [B, *] by name, the same ones for every batch.
        needs: What it reads of the observation.
    """

    def __init__(self, read: Callable[[Observation, Batch], Mapping[str, Tensor]], *, needs: Needs = Needs()) -> None:
        self.needs = needs
        self._read = read
        self._parts: list[dict[str, Tensor]] = []

    def update(self, seen: Observation, batch: Batch) -> None:
        """Keep the rows of a batch."""
        columns = {"indices": batch.indices, **self._read(seen, batch)}
        self._parts.append({name: rows.cpu() for name, rows in columns.items()})

    def merge(self, other: Self) -> None:
        """Add the rows of another process."""
        self._parts = [*self._parts, *other._parts]

    def result(self) -> dict[str, Tensor]:
        """Columns [N, *] by name on the CPU, and the images' `indices`, in rising order; empty without images."""
        if not self._parts:
            return {}
        order = torch.cat([part["indices"] for part in self._parts]).argsort()
        return {name: torch.cat([part[name] for part in self._parts])[order] for name in self._parts[0]}

    def __getstate__(self) -> dict[str, Any]:
        return {"needs": self.needs, "_parts": self._parts}  # the reader may hold a model


def run_pass(
    model: nn.Module,
    source: ImageSource,
    meters: Sequence[AnyMeter],
    *,
    transform: Transform | None,
    batch_size: int = 8,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_unreadable: bool = False,
    progress: str | None = None,
) -> list[AnyMeter]:
    """Run the model on every image once, and show the meters what they need of it.

    All processes must call it, each with a whole model and meters of its own; they share the images.

    Args:
        model: A ViT of timm or transformers, on the device where it is to run. It is not changed.
        source: The images.
        meters: New ones. If none of them needs anything, the network does not run.
        transform: Turns an image into the model's input; it is not applied to images given as tensors.
        batch_size: Images at a time and per process.
        num_workers: Further processes that decode.
        rank: Which of the processes this is.
        world_size: Number of processes.
        skip_unreadable: Leave out images that cannot be read.
        progress: Text of the first process's progress bar; None for no bar.

    Returns:
        The meters with what all processes saw, the same in every process.

    Raises:
        DataError: An image cannot be used in one of the processes, or the model is not a ViT that can be read.
    """

    def share() -> list[AnyMeter]:
        needs = reduce(or_, [meter.needs for meter in meters], Needs())
        device = VitLayout.of(model).embedding.weight.device
        batches = source.batches(
            transform,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            skip_unreadable=skip_unreadable,
        )
        total = None if source.num_images is None else math.ceil(source.num_images / world_size)
        hidden = progress is None or rank != 0
        with tqdm(total=total, desc=progress, unit="image", disable=hidden, leave=False) as bar:
            for batch in batches:
                batch = replace(batch, images=batch.images.to(device))
                seen: Any = observe(model, batch.images, **asdict(needs)) if needs != Needs() else None
                for meter in meters:
                    meter.update(seen, batch)
                bar.update(len(batch.images))
        return list(meters)

    merged, *others = gathered(share, world_size=world_size)
    for other in others:
        for meter, part in zip(merged, other, strict=True):
            meter.merge(part)
    return merged


def gathered(work: Callable[[], Work], *, world_size: int) -> list[Work]:
    """Do this process's share of some work; returns the results of all processes in the order of their ranks.

    Raises:
        DataError: One of the processes raised it. All do then, since the others would wait for it forever.
    """
    mine: Work | DataError
    try:
        mine = work()
    except DataError as error:
        mine = error
    shares: list[Any] = [mine]
    if world_size > 1:
        shares = [None] * world_size
        distributed.all_gather_object(shares, mine)
    for share in shares:
        if isinstance(share, DataError):
            raise share
    return shares
