"""Pictures with what is known of every pixel, made ready in an order that does not depend on who does it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.segmentation_metrics import IGNORED, zero_label_reduced

Key = TypeVar("Key")
Made = TypeVar("Made")


class Picture(Protocol):
    """A picture and what is known of it, as `vitreg_hub.images.dense` reads it."""

    @property
    def name(self) -> str:
        """Its file, or which it is in its source."""
        ...

    @property
    def image(self) -> Image.Image:
        """RGB."""
        ...

    @property
    def mask(self) -> np.ndarray | None:
        """[H, W] int64, the class of every pixel."""
        ...

    @property
    def depth(self) -> np.ndarray | None:
        """[H, W] float32, metres, 0 where unknown."""
        ...


class Pictures(Protocol):
    """Pictures by index."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in masks."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Who computes; none of it changes the result beyond rounding.

    Attributes:
        rank: Which of the processes this is.
        world_size: Number of processes, among which the images are divided.
        num_workers: Further processes that prepare images, 0 for none.
        progress: Whether a bar is shown.
    """

    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    progress: bool = False


ALONE = Workers()
"""One process without workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Pictures with the classes of their pixels.

    Attributes:
        source: Pictures with masks.
        num_classes: How many classes there are.
        ignore_index: Label of pixels that do not count.
        reduce_zero_label: Ignore label 0 and number the others from there.
    """

    source: Pictures
    num_classes: int
    ignore_index: int = IGNORED
    reduce_zero_label: bool = False

    def __call__(self, index: int) -> tuple[Picture, np.ndarray]:
        """A picture and its labels [H, W], int64.

        Raises:
            DataError: There is no mask, or one of another size or with labels out of range.
        """
        picture = self.source[index]
        labels = torch.from_numpy(np.asarray(_there(picture, picture.mask, "mask"), dtype=np.int64))
        if self.reduce_zero_label:
            labels = zero_label_reduced(labels, ignore_index=self.ignore_index)
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= self.num_classes))
        if wrong.any():
            raise DataError(
                f"the mask of {picture.name} has the label {int(labels[wrong][0])}, but there are {self.num_classes} "
                f"classes, from 0, and {self.ignore_index} for pixels that do not count: give num_classes, "
                "ignore_index or reduce_zero_label."
            )
        return picture, labels.numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Pictures with the depths of their pixels.

    Attributes:
        source: Pictures with depth.
    """

    source: Pictures

    def __call__(self, index: int) -> tuple[Picture, np.ndarray]:
        """A picture and its depth [H, W], float32 metres.

        Raises:
            DataError: There is none, or one of another size.
        """
        picture = self.source[index]
        return picture, np.asarray(_there(picture, picture.depth, "depth"), dtype=np.float32)


def _there(picture: Picture, values: np.ndarray | None, what: str) -> np.ndarray:
    if values is None:
        raise DataError(f"{picture.name} has no {what}: leave it out, or add what is missing.")
    size = picture.image.height, picture.image.width
    if values.shape != size:
        raise DataError(
            f"the {what} of {picture.name} has {values.shape[1]} x {values.shape[0]} pixels, but the picture has "
            f"{size[1]} x {size[0]}: both must be of one size."
        )
    return values


def made(make: Callable[[Key], Made], keys: Iterable[Key], *, num_workers: int = 0) -> Iterator[Made]:
    """Yield what is made of every key, in order.

    Args:
        make: Runs in the workers, to which it is sent.
        keys: For which it is called.
        num_workers: Further processes, 0 for none.

    Raises:
        DataError: As from `make`.
    """
    loader = DataLoader(
        _Maker(make),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # else every pass would advance the global one
    )
    for value in loader:
        if isinstance(value, DataError):
            raise value
        yield value


class _Maker(torch.utils.data.Dataset):
    """What runs in the workers."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, key: Any) -> Any:
        """Returns an error instead of raising it: from a worker, it would arrive with a traceback in its text."""
        try:
            return self.make(key)
        except DataError as error:
            return error


def _unchanged(value: Any) -> Any:
    return value
