"""What an evaluation works on: a model, processes, and images to learn from and to score, opened once."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from vitreg_hub.any_vit import AnyVit, open_vit
from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.features import Features, extract
from vitreg_hub.evaluation.interventions import Intervention, RegisterBank, intervened
from vitreg_hub.evaluation.results import DataFacts, EvaluatedModel
from vitreg_hub.images.data_sets import ON_HUB
from vitreg_hub.images.embedded import TRAINING_SETS, Split
from vitreg_hub.images.source import Batch, Images, ImageSource, open_images
from vitreg_hub.network.layout import VitLayout, has_classes, unwrapped
from vitreg_hub.passes import require_channels, require_sensible

FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "test": ("test", "val", "validation")}
"""What folders of a data set are called that hold its parts."""


class Options(TypedDict, total=False):
    """How an evaluation runs.

    Attributes:
        img_size: Side, or height and width, of the images in pixels, if not the model's own.
        max_images: Use at most this many of each source: a random choice, or the first ones of a stream.
        batch_size: Images at a time and per process, 32 by default.
        num_workers: Processes that decode images, 0 by default.
        device: Where a model by name runs; a GPU if there is one.
        dtype: Number type of a model by name, float32 by default.
        seed: Decides all that is drawn.
        progress: Show progress bars.
    """

    img_size: int | tuple[int, int] | None
    max_images: int | None
    batch_size: int
    num_workers: int
    device: torch.device | str | None
    dtype: torch.dtype | None
    seed: int
    progress: bool


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to be scored, and how; `Opened.of` makes it.

    Attributes:
        vit: The network and its preprocessing.
        options: As they were given.
        processes: That share the images.
    """

    vit: AnyVit
    options: Options
    processes: PartialState

    @classmethod
    def of(cls, model: nn.Module | str | Path, **options: Unpack[Options]) -> "Opened":
        """Open a model.

        Raises:
            VitregError: It cannot be opened, or an option makes no sense.
        """
        require_sensible(options, Options.__annotations__)
        processes = PartialState(cpu=not torch.accelerator.is_available())
        vit = open_vit(
            model,
            device=options.get("device") or processes.device,
            dtype=options.get("dtype"),
            img_size=options.get("img_size"),
            any_size=True,
            head=True,
        )
        return cls(vit=vit, options=options, processes=processes)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.vit.model

    @property
    def layout(self) -> VitLayout:
        """Its parts."""
        return VitLayout.of(self.model)

    @property
    def classifies(self) -> bool:
        """Whether the model has a head that tells classes."""
        return has_classes(unwrapped(self.model))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.layout.embedding.weight.device

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.options.get("seed", 0)

    @property
    def shows_progress(self) -> bool:
        """Whether this process shows bars."""
        return self.options.get("progress", sys.stderr.isatty()) and self.processes.is_main_process

    @property
    def facts(self) -> EvaluatedModel:
        """What was opened."""
        layout = self.layout
        return EvaluatedModel(
            name=self.vit.name,
            num_params=sum(parameter.numel() for parameter in layout.network.parameters()),
            num_registers=layout.num_registers,
            img_size=self.vit.size,
            preprocessing=self.vit.preprocessing,
        )

    def batches(self, source: ImageSource, what: str, *, skip_unreadable: bool = False) -> Iterator[Batch]:
        """Yield this process's share of the images, under a bar that says what they are for."""
        require_channels(self.vit, source)
        total = source.num_images and math.ceil(source.num_images / self.processes.num_processes)
        with tqdm(total=total, desc=f"{self.vit.name}: {what}", unit="image", disable=not self.shows_progress) as bar:
            for batch in source.batches(
                self.vit.transform,
                batch_size=self.options.get("batch_size", 32),
                num_workers=self.options.get("num_workers", 0),
                rank=self.processes.process_index,
                world_size=self.processes.num_processes,
                skip_unreadable=skip_unreadable,
            ):
                yield batch
                bar.update(len(batch.images))

    def features(
        self,
        source: ImageSource,
        what: str,
        *,
        logits: bool = False,
        intervention: Intervention | None = None,
        bank: RegisterBank | None = None,
    ) -> Features:
        """Features of all images of a source, the same on every process."""
        changed = nullcontext() if intervention is None or bank is None else intervened(self.model, intervention, bank)
        with changed:
            return extract(
                self.model, self.batches(source, what), logits=logits, world_size=self.processes.num_processes
            )

    def bank(self, source: ImageSource) -> RegisterBank:
        """Registers of the first images of a source, the same on every process."""
        batches = source.batches(self.vit.transform, batch_size=self.options.get("batch_size", 32))
        return RegisterBank.of(self.model, batches)


def open_split(
    images: Images, split: Split, *, max_images: int | None = None, seed: int = 0, shared: bool = False
) -> ImageSource | None:
    """Open one part of a data set.

    Args:
        images: Images as `open_images` takes them; an embedded set, a folder with a part in a folder of its own
            (train/, val/), or ``org/name`` on the Hub gives that part of it.
        split: The part.
        max_images: Use at most this many.
        seed: Decides which.
        shared: Whether `images` were given for another part: None then says that they have no such one.

    Raises:
        DataError: There are no such images.
    """
    limits: dict[str, Any] = {"max_images": max_images, "seed": seed}
    if isinstance(images, str) and images in TRAINING_SETS:
        return open_images(TRAINING_SETS[images](split), name=f"{images}:{split}", **limits)
    if isinstance(images, str | Path) and os.path.isdir(images):
        part = next((Path(images, name) for name in FOLDERS[split] if Path(images, name).is_dir()), None)
        if part is not None:
            return open_images(part, **limits)
    elif isinstance(images, str) and split == "train" and ON_HUB.fullmatch(images) and ":" not in images:
        return open_images(f"{images}:train", **limits)
    return None if shared else open_images(images, **limits)


def data_facts(source: ImageSource, features: Features) -> DataFacts:
    """What is reported of images."""
    return DataFacts(name=source.name, num_images=len(features), classes=class_list(source, features))


def class_list(source: ImageSource, features: Features) -> tuple[str, ...]:
    """Names of the classes of a source, or their numbers."""
    if source.label_names:
        return source.label_names
    labels = features.labels
    return tuple(map(str, range(int(labels.max()) + 1))) if len(labels) and int(labels.max()) >= 0 else ()


def require_same_classes(train: ImageSource, test: ImageSource) -> None:
    """Refuse to score with other classes than those that were learned.

    Raises:
        DataError: The names differ, or their order.
    """
    if train.label_names and test.label_names and train.label_names != test.label_names:
        missing = [name for name in test.label_names if name not in train.label_names]
        hint = f"{test.name} has the class {missing[0]!r}" if missing else "they are not the same, or in another order"
        raise DataError(f"{train.name} and {test.name} must have the same classes, but {hint}.")
