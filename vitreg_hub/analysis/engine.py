"""One model and one set of images: a pass for the norms, and a pass for all that depends on them."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, Unpack

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from vitreg_hub.analysis.meters.norms import NormMeter
from vitreg_hub.analysis.results import BlockNorms, ImageFacts, ModelFacts
from vitreg_hub.any_vit import open_vit
from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import TILE, photos
from vitreg_hub.images.source import Batch, Images, open_images
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.passes import Needs, failing_together, gathered, observed, require_channels, require_sensible
from vitreg_hub.tokens import Observation

PHOTOS = "photos"
"""Name of the images that are used if none are given."""


class Options(TypedDict, total=False):
    """How an analysis runs; every measure takes these as keywords.

    Attributes:
        cutoff: Norm above which a patch token is an outlier; found per block from the norms by default.
        block: Block whose outliers count, negative from the end; the last by default.
        img_size: Side, or height and width, of the images in pixels, if not the model's own.
        max_images: Use at most this many: a random choice, or the first ones of a stream.
        batch_size: Images at a time and per process, 8 by default.
        num_workers: Processes that decode images, 0 by default.
        device: Where a model by name runs; a GPU if there is one.
        dtype: Number type of a model by name, float32 by default.
        seed: Decides which images and tokens are drawn where not all are used.
        progress: Show a progress bar.
    """

    cutoff: float | None
    block: int
    img_size: int | tuple[int, int] | None
    max_images: int | None
    batch_size: int
    num_workers: int
    device: torch.device | str | None
    dtype: torch.dtype | None
    seed: int
    progress: bool


class OutlierMeter(Protocol):
    """Adds up what it sees in the second pass, batch by batch. Its memory does not grow with the number of images.

    What it finds does not depend, beyond rounding, on how the images are cut into batches and shared by processes.
    """

    @property
    def needs(self) -> Needs:
        """What it reads of an observation."""
        ...

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        """Add a batch: indices [B] of the images in the data set, labels [B], outliers [B, P] bool."""

    def merge(self, other: Self) -> None:
        """Add what another process saw."""

    def result(self) -> Any:
        """What was measured."""


class Study:
    """One model, opened by `open_vit`, and one set of images, opened by `open_images`. The model is not changed.

    Raises:
        VitregError: The model or the images cannot be opened, or an option makes no sense.
    """

    def __init__(self, model: nn.Module | str | Path, images: Images, **options: Unpack[Options]) -> None:
        require_sensible(options, Options.__annotations__)
        cutoff = options.get("cutoff")
        if cutoff is not None and not 0 < cutoff < math.inf:
            raise DataError(f"cutoff is {cutoff}: give a norm above 0, or leave it out to have it found.")
        self.options = options
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        self._world_size = self.processes.num_processes
        self.opened = open_vit(
            model,
            device=options.get("device") or self.processes.device,
            dtype=options.get("dtype"),
            img_size=options.get("img_size"),
        )
        self.layout = VitLayout.of(self.opened.model)
        depth, block = len(self.layout.blocks), options.get("block", -1)
        if not -depth <= block < depth:
            raise DataError(
                f"block {block} does not exist: {self.opened.name} has {depth}, 0 to {depth - 1} or -{depth} to -1."
            )
        self.block = block % depth
        self.seed = options.get("seed", 0)
        self._hidden = not (options.get("progress", False) and self.processes.is_main_process)
        self.whole_pictures = isinstance(images, str) and images == PHOTOS and max(self.opened.size or (0,)) > 2 * TILE
        self.source = open_images(
            photos(whole=True) if self.whole_pictures else images,
            name=PHOTOS if self.whole_pictures else None,
            max_images=options.get("max_images"),
            seed=self.seed,
        )
        require_channels(self.opened, self.source)

    @cached_property
    def norms(self) -> NormMeter:
        """The first pass: norms of all tokens after every block, and with them the cutoffs.

        Raises:
            DataError: There are no images, or the model gives numbers that are not finite.
        """
        meter = NormMeter(cutoff=self.options.get("cutoff"))
        with failing_together(world_size=self._world_size):
            for seen, _ in self._observed(Needs(norms=True), "norms"):
                meter.update(seen)
        meter, *others = gathered(meter, world_size=self._world_size)
        for other in others:
            meter.merge(other)
        if not meter.num_images:
            raise DataError(f"{self.source.name} holds no images.")
        if not meter.is_finite:
            raise DataError(
                f"{self.opened.name} gives tokens that are not finite, so nothing can be measured: "
                "run it in float32 (--dtype float32), or check its weights."
            )
        return meter

    @cached_property
    def blocks(self) -> tuple[BlockNorms, ...]:
        """Norms after each block, and which of them are outliers."""
        return self.norms.result()

    def measure(self, meters: Mapping[str, OutlierMeter]) -> dict[str, Any]:
        """The second pass: what needs to know which patches are outliers. Results are the same on every process."""
        needs = reduce(or_, [meter.needs for meter in meters.values()], Needs(norms=True))
        cutoff = self.blocks[self.block].cutoff.norm
        with failing_together(world_size=self._world_size):
            for seen, batch in self._observed(needs, "tokens"):
                outliers = seen.norms[self.block, :, seen.order.num_prefix :] > cutoff
                for meter in meters.values():
                    meter.update(seen, batch.indices, batch.labels, outliers)
        merged, *others = gathered(meters, world_size=self._world_size)
        results = {}
        with tqdm(total=len(meters), unit="measure", disable=self._hidden, leave=False) as bar:
            for name, meter in merged.items():
                for other in others:
                    meter.merge(other[name])
                bar.set_description(f"{self.opened.name}: {name.replace('_', ' ')}")
                results[name] = meter.result()
                bar.update()
        return results

    def measure_one(self, meter: OutlierMeter) -> Any:
        """The second pass for one meter alone; returns its result."""
        return self.measure({"tokens": meter})["tokens"]

    def model_facts(self, *, step: int | None = None) -> ModelFacts:
        """What the model is. Known after the first pass."""
        order, (height, width) = self.norms.order, self.norms.image_size
        return ModelFacts(
            name=self.opened.name,
            num_params=sum(parameter.numel() for parameter in self.layout.network.parameters()),
            depth=len(self.layout.blocks),
            embed_dim=self.layout.embedding.out_channels,
            num_class_tokens=order.num_class,
            num_registers=order.num_registers,
            patch_size=(height // order.grid[0], width // order.grid[1]),
            step=step,
        )

    def image_facts(self) -> ImageFacts:
        """What the images are. Known after the first pass."""
        return ImageFacts(
            name=self.source.name,
            num_images=self.norms.num_images,
            size=self.norms.image_size,
            grid=self.norms.order.grid,
            preprocessing="given as tensors" if isinstance(self.source.rows, Tensor) else self.opened.preprocessing,
        )

    def _observed(self, needs: Needs, what: str) -> Iterator[tuple[Observation, Batch]]:
        """Yield this process's share of the images, and what the model shows of them."""
        batches = self.source.batches(
            self.opened.transform,
            batch_size=self.options.get("batch_size", 8),
            num_workers=self.options.get("num_workers", 0),
            rank=self.processes.process_index,
            world_size=self._world_size,
        )
        num_images = self.source.num_images
        total = None if num_images is None else math.ceil(num_images / self._world_size)
        title = f"{self.opened.name}: {what}"
        with tqdm(total=total, desc=title, unit="image", disable=self._hidden, leave=False) as bar:
            for seen, batch in observed(self.opened.model, batches, needs):
                yield seen, batch
                bar.update(len(batch.images))
