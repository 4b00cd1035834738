"""From rows to the pieces that batches are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import BROKEN, read_rgb
from vitreg_hub.training.data.opening import TrainingData
from vitreg_hub.training.distributed.randomness import seed_of, seeded
from vitreg_hub.training.tasks.settings import Need

Transform = Callable[[Image.Image], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image in views [C, H, W], with its class (-1: unknown) and its caption (empty: none)."""

    name: str
    views: tuple[Tensor, ...]
    label: int
    text: str


class Piece(NamedTuple):
    """What workers hand over, as in a `Batch`; a tuple, because torch can pin its tensors."""

    names: Sequence[str]
    crops: Sequence[Tensor]
    labels: Tensor | None
    texts: Sequence[str] | None
    corrupt: Sequence[str]
    num_read: int
    position: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleReader:
    """Makes samples of rows; `transform` draws from the global generators."""

    data: TrainingData
    transform: Transform
    needs: frozenset[Need] = frozenset()

    def read(self, row: dict[str, Any], number: int, key: Sequence[int]) -> Sample | str:
        """Read a row, whose random numbers have a key; its number is for messages.

        Returns:
            The sample, or the name of an image that cannot be read.

        Raises:
            DataError: A label or caption that is needed is missing, a label is out of range, or the row names a
                picture that it may not.
        """
        name = self.data.called(row, number)
        try:
            image = read_rgb(row[self.data.image_column], within=self.data.within)
        except DataError:
            raise
        except BROKEN:
            return name
        with seeded(*key):
            views = tuple(self.transform(image))
        return Sample(name=name, views=views, label=self._label(row, name), text=self._text(row, name, key))

    def _label(self, row: dict[str, Any], name: str) -> int:
        data = self.data
        label = row[data.label_column] if data.label_column else None
        if label is None or label == -1:  # how some sets on the Hub write "no label"
            if "labels" in self.needs:
                raise DataError(f"{name} of {data.name} has no label, which this task needs: leave such images out.")
            return -1
        if not 0 <= label < (data.num_classes or 2**63):
            classes = f"from 0 to {data.num_classes - 1}" if data.num_classes else "from 0"
            raise DataError(
                f"{name} of {data.name} has the label {label}, but classes are numbered {classes}: correct the labels."
            )
        return int(label)

    def _text(self, row: dict[str, Any], name: str, key: Sequence[int]) -> str:
        text = row[self.data.text_column] if self.data.text_column else None
        if isinstance(text, list):
            texts = [one for one in text if one]
            text = texts[seed_of(*key, 0) % len(texts)] if texts else None
        if not text and "texts" in self.needs:
            raise DataError(f"{name} of {self.data.name} has no caption, which this task needs: leave such images out.")
        return text or ""

    def piece(self, samples: Sequence[Sample], corrupt: Sequence[str], num_read: int, position: Any = None) -> Piece:
        """Stack samples."""
        data = self.data
        return Piece(
            names=tuple(sample.name for sample in samples),
            crops=tuple(torch.stack(views) for views in zip(*(sample.views for sample in samples), strict=True)),
            labels=torch.tensor([sample.label for sample in samples]) if data.has_labels else None,
            texts=tuple(sample.text for sample in samples) if data.has_texts else None,
            corrupt=tuple(corrupt),
            num_read=num_read,
            position=position,
        )
