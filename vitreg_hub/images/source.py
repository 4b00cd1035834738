"""Images from anywhere, batch by batch, for everything that is measured on images."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import (
    FORMS,
    Rows,
    features_of,
    find_column,
    is_integer,
    is_words,
    open_named,
    undecoded,
)
from vitreg_hub.images.embedded import EMBEDDED
from vitreg_hub.images.pictures import BROKEN, file_of, read_rgb

logger = logging.getLogger(__name__)

DEFAULT_SPLITS = ("test", "validation", "train")
"""Splits on the Hub; if none is named, the first of these that exists is read."""

Images = Tensor | np.ndarray | Sequence[Image.Image | Tensor | np.ndarray] | str | Path | Rows
"""Images in any form that `open_images` takes."""

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images that are read together.

    Attributes:
        indices: [B] int64, of the images in the source.
        images: [B, C, H, W]; C is 3, or what the model takes.
        labels: [B] int64, -1 where one is missing; None without labels.
        skipped: Why images were left out, one sentence for each.
        files: [B] where the images come from, empty for one that is in no file.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor | None
    skipped: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Images that can be read again and again; `open_images` makes it.

    Attributes:
        num_images: How many there are; None for a stream.
        rows: What holds the images: read by index, or by iteration if it is a stream.
        picked: Indices of the rows that are read; None for a stream.
        within: Folder or URLs below which rows may name files, as in `read_rgb`.
    """

    name: str
    num_images: int | None
    label_names: tuple[str, ...] | None = None
    rows: Any = field(repr=False)
    picked: Sequence[int] | None = field(default=None, repr=False)
    image_column: str | None = None
    label_column: str | None = None
    within: str | None = None

    @property
    def has_labels(self) -> bool:
        """Whether the images have labels."""
        return self.label_column is not None

    def batches(
        self,
        transform: Transform | None,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        skip_unreadable: bool = False,
    ) -> Iterator[Batch]:
        """Read this process's share: every `world_size`-th image, so that all processes together read each one once.

        Every process reads the whole of a stream, but decodes only its share.

        Args:
            transform: Makes a tensor [C, H, W] of an RGB image. It is not applied to images given as tensors.
            batch_size: Images per batch; the last batch may be smaller.
            skip_unreadable: Leave out images that cannot be read; batches may then be smaller or missing.

        Raises:
            DataError: An image cannot be read and is not skipped, or differs in size from the others, a transform is
                needed, or a number makes no sense.
        """
        if batch_size < 1 or num_workers < 0:
            raise DataError(
                f"batch_size is {batch_size} and num_workers is {num_workers}: give at least 1 image and 0 workers."
            )
        if transform is None and not isinstance(self.rows, Tensor):
            raise DataError(
                f"{self.name}: the model's preprocessing is unknown, so give images as a tensor [N, 3, H, W]."
            )
        loader = DataLoader(
            _Reader(self, transform, skip_unreadable),
            batch_size=batch_size,
            sampler=self._share(rank, world_size),
            num_workers=0 if isinstance(self.rows, Tensor) else num_workers,
            collate_fn=unchanged,
            generator=torch.Generator(),  # else every pass would advance the global one
        )
        first = None
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            for what in batch.skipped:
                logger.warning("left out: %s", what)
            if not len(batch.images):
                continue
            if first is None:
                first = batch
            self._require_equal(first.indices[0], first.images[0], batch.indices[0], batch.images[0])
            yield batch

    def at_most(self, number: int, *, seed: int = 0) -> Self:
        """At most this number of images: a random subset in order, or the first ones of a stream."""
        if self.picked is None:
            return replace(self, rows=self.rows.take(number))
        if len(self.picked) <= number:
            return self
        places = np.sort(np.random.default_rng(seed).choice(len(self.picked), number, replace=False))
        return replace(self, picked=np.asarray(self.picked)[places], num_images=number)

    def _share(self, rank: int, world_size: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, row) of one process's images; of a stream only, since workers look up other rows themselves."""
        if self.picked is not None:
            for index in self.picked[rank::world_size]:
                yield int(index), None
            return
        for index, row in enumerate(self.rows):
            if index % world_size == rank:
                yield index, row

    def _require_equal(self, index: int, image: Tensor, other_index: int, other: Tensor) -> None:
        if image.shape != other.shape:
            sizes = " and ".join(f"{tensor.shape[-2]}x{tensor.shape[-1]}" for tensor in (image, other))
            raise DataError(
                f"images {index} and {other_index} of {self.name} have {sizes} pixels after preprocessing: "
                "resize or crop all to one size."
            )


class _Reader(torch.utils.data.Dataset):
    """What runs in the workers: rows to batches."""

    def __init__(self, source: ImageSource, transform: Transform | None, skip_unreadable: bool) -> None:
        self.source, self.transform, self.skip_unreadable = source, transform, skip_unreadable

    def __getitems__(self, items: list[tuple[int, Any]]) -> Batch | DataError:
        """Returns an error instead of raising it: from a worker, it would arrive with a traceback in its text."""
        try:
            return self._batch(items)
        except DataError as error:
            return error

    def _batch(self, items: list[tuple[int, Any]]) -> Batch:
        source = self.source
        indices, images, labels, skipped, files = [], [], [], [], []
        for index, row in items:
            row = source.rows[index] if row is None else row
            picture = row[source.image_column] if source.image_column else row
            try:
                image = picture if isinstance(picture, Tensor) else read_rgb(picture, within=source.within)
            except DataError:
                raise
            except BROKEN as error:
                file = f" ({path})" if (path := file_of(picture)) else ""
                sentence = f"image {index} of {source.name}{file} cannot be read: {error}."
                if not self.skip_unreadable:
                    raise DataError(sentence) from error
                skipped.append(sentence)
                continue
            indices.append(index)
            files.append(file_of(picture) or "")
            images.append(image if isinstance(image, Tensor) else self.transform(image))  # pyright: ignore[reportOptionalCall]  # only tensors need none
            source._require_equal(indices[0], images[0], index, images[-1])
            if source.label_column:
                label = row[source.label_column]
                if label is not None and not -(2**63) <= label < 2**63:
                    raise DataError(f"image {index} of {source.name} has the label {label}: number classes from 0.")
                labels.append(-1 if label is None else int(label))
        return Batch(
            indices=torch.tensor(indices, dtype=torch.int64),
            images=torch.stack(images) if images else torch.empty(0),
            labels=torch.tensor(labels, dtype=torch.int64) if source.has_labels else None,
            skipped=tuple(skipped),
            files=tuple(files),
        )


def unchanged(batch: Any) -> Any:
    """Replaces torch's collation where batches are ready. Also hands over errors."""
    return batch


def open_images(
    images: Images, *, name: str | None = None, max_images: int | None = None, seed: int = 0
) -> ImageSource:
    """Open images in any of these forms. Data sets on the Hub are streamed: nothing is copied to the disk.

    Args:
        images: A tensor [N, C, H, W] that is already preprocessed, or a list of such [C, H, W], also as arrays of
            floating-point numbers; PIL images, or arrays of bytes [H, W] or [H, W, 3]; a folder, whose sub-folders are
            classes if there are several and they hold most images; a data set with one column of images (or one called
            "image") and at most one of class labels (or whole numbers or words called "label"); the name of an
            embedded data set; or ``org/name[:split]`` on the Hub.
        name: What to call them instead of their own name.
        max_images: Read at most this many: a random subset in order, or the first ones of a stream.
        seed: Decides which subset.

    Raises:
        DataError: There are no such images.
    """
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images is {max_images}: give at least 1, or None for all.")
    within = None
    if isinstance(images, str | Path):
        if os.path.exists(images) and not (os.path.isdir(images) or images in EMBEDDED):
            raise DataError(f"{images} is a file: give its folder, or the opened image in a list.")
        called, images, _, within = open_named(images, sets=EMBEDDED, splits=DEFAULT_SPLITS, wanted="images")
        name = name or called
    if isinstance(images, Sequence | np.ndarray):
        images = _together(images)
    if isinstance(images, datasets.Dataset | datasets.IterableDataset):
        source = _of_data_set(images)
    elif isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise DataError(
                f"images as a tensor must be [N, 3, H, W] of floating-point numbers that the model takes as they are, "
                f"not {str(images.dtype).removeprefix('torch.')} {list(images.shape)}."
            )
        source = ImageSource(name="tensor", num_images=len(images), rows=images)
    elif isinstance(images, Sequence) and images and isinstance(images[0], Image.Image):
        source = ImageSource(name="pictures", num_images=len(images), rows=images)
    else:
        raise DataError(f"{type(images).__name__} cannot be read as images: give {FORMS}.")
    picked = None if source.num_images is None else range(source.num_images)
    source = replace(source, name=name or source.name, picked=picked, within=within)
    if source.num_images == 0:
        raise DataError(f"{source.name} holds no images.")
    return source if max_images is None else source.at_most(max_images, seed=seed)


def _together(images: Sequence[Any] | np.ndarray) -> Any:
    """Numbers as one tensor, and arrays of bytes as pictures; anything else unchanged."""
    if not len(images) or isinstance(images[0], Image.Image):
        return images
    if all(isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in images):
        if all(image.ndim == 2 or image.shape[2:] == (3,) for image in images):
            return [Image.fromarray(image) for image in images]
        return images
    if not all(isinstance(image, np.ndarray | Tensor) for image in images):
        return images
    if len(shapes := sorted({tuple(image.shape) for image in images})) > 1:
        raise DataError(f"the images have the shapes {shapes[0]} and {shapes[1]}: resize or crop all to one size.")
    try:
        return torch.stack([torch.as_tensor(image, dtype=_single(image)) for image in images])
    except TypeError:  # an array of something else than numbers
        return images


def _single(image: Tensor | np.ndarray) -> torch.dtype | None:
    return torch.float32 if image.dtype == np.float64 else None


def _of_data_set(data: Rows) -> ImageSource:
    """Find the columns, and leave decoding to the reader."""
    data = data.with_format(None)
    features = features_of(data)
    image = find_column([name for name, kind in features.items() if isinstance(kind, datasets.Image)], ["image"])
    if image is None:
        raise DataError(
            f"the data set needs one column of images, or one called 'image', but its columns are {dict(features)}."
        )
    label = find_column([name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)], ["label"])
    if label is None and is_integer(features.get("label")):
        label = "label"
    if label is None and is_words(features.get("label")) and isinstance(data, datasets.Dataset):
        label = "label"
    name = data.info.dataset_name
    data, label, label_names = undecoded(data, image=image, label=label, called=name or "the data set")
    return ImageSource(
        name=name or "data set",
        num_images=len(data) if isinstance(data, datasets.Dataset) else None,
        label_names=label_names,
        rows=data,
        image_column=image,
        label_column=label,
    )
