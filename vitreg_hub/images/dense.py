"""Pictures with masks, depths or boxes, one by one: what dense predictions are trained on and scored by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import Rows, features_of
from vitreg_hub.images.embedded import TRAINING_SETS
from vitreg_hub.images.pictures import BROKEN, file_of, read_rgb
from vitreg_hub.images.scenes import MASK_CLASSES, UNITS
from vitreg_hub.images.targets import part, read_boxes, read_depth, read_mask

Target = Literal["mask", "depth", "boxes"]

IGNORED = 255
"""The label of pixels that count nowhere, unless told otherwise."""

USUAL = {
    "image": ("image", "img", "rgb", "picture"),
    "mask": ("mask", "annotation", "segmentation", "semantic_mask", "label"),
    "depth": ("depth", "depth_map"),
    "boxes": ("boxes",),
    "bbox": ("objects.bbox", "bbox"),
    "caption": ("caption", "text"),
    "label": ("label",),
}
"""Columns that a data set may have, by what they hold; boxes are corners, bbox has COCO's widths and heights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotated:
    """One picture and what is known of it.

    Attributes:
        index: Of the picture in its source.
        name: Its file, or "image 3 of scenes", for sentences.
        image: RGB, at its own size.
        mask: [H, W] int64, the class of each pixel as stored (255 is usually ignored).
        depth: [H, W] float32, metres, 0 where unknown.
        boxes: [K, 4] float32: left, top, right and bottom edge in pixels.
        caption: A sentence about it.
        label: Its class.
    """

    index: int
    name: str
    image: Image.Image
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None
    boxes: np.ndarray | None = None
    caption: str | None = None
    label: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedSource:
    """Pictures with annotations, read one by one; `open_annotated` makes it.

    Attributes:
        name: What the pictures are called.
        num_images: How many there are; None for a stream.
        class_names: Names of the mask's classes; None if they are unknown.
        target: What every picture must have.
        columns: Where rows hold what, by the names in `USUAL`.
        rows: What holds the pictures: read by index, or by iteration if it is a stream.
        picked: Indices of the rows that are read; None for a stream.
        depth_scale: As in `targets.read_depth`.
        within: As in `pictures.read_rgb`.
    """

    name: str
    num_images: int | None
    class_names: tuple[str, ...] | None = None
    target: Target
    columns: Mapping[str, str]
    rows: Any = field(repr=False)
    picked: Sequence[int] | None = field(default=None, repr=False)
    depth_scale: float | None = None
    within: str | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is there: of mask, depth and boxes."""
        there = {"boxes" if column == "bbox" else column for column in self.columns}
        return tuple(target for target in ("mask", "depth", "boxes") if target in there)

    def __len__(self) -> int:
        """How many pictures there are.

        Raises:
            DataError: It is a stream.
        """
        if self.num_images is None:
            raise DataError(f"{self.name} is a stream of unknown length: give max_images, or iterate over pictures().")
        return self.num_images

    def __getitem__(self, index: int) -> Annotated:
        """Read a picture by its place.

        Raises:
            DataError: It or its annotation cannot be read, or it is a stream.
            IndexError: There are fewer.
        """
        if self.picked is None:
            raise DataError(f"{self.name} is a stream, which has no places: iterate over pictures().")
        return self._read(int(self.picked[index]), None)

    def at_most(self, number: int, seed: int = 0) -> Self:
        """At most this number of pictures: a random subset in order, or the first ones of a stream."""
        if self.picked is None:
            return replace(self, rows=self.rows.take(number))
        if len(self.picked) <= number:
            return self
        places = np.sort(np.random.default_rng(seed).choice(len(self.picked), number, replace=False))
        return replace(self, picked=np.asarray(self.picked)[places], num_images=number)

    def pictures(self, *, rank: int = 0, world_size: int = 1, num_workers: int = 0) -> Iterator[Annotated]:
        """Read this process's share, every `world_size`-th picture, in order.

        Args:
            rank: Which of the processes this is.
            world_size: Number of processes.
            num_workers: Further processes that decode, 0 for none.

        Raises:
            DataError: A picture or its annotation cannot be read.
        """
        loader = DataLoader(
            _Reader(self),
            batch_size=None,
            sampler=self._share(rank, world_size),
            num_workers=num_workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else every pass would advance the global one
        )
        for picture in loader:
            if isinstance(picture, DataError):
                raise picture
            yield picture

    def _share(self, rank: int, world_size: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, row) of one process's pictures; of a stream only, since workers look up other rows."""
        if self.picked is not None:
            yield from ((int(index), None) for index in self.picked[rank::world_size])
            return
        yield from ((index, row) for index, row in enumerate(self.rows) if index % world_size == rank)

    def _read(self, index: int, row: Mapping[str, Any] | None) -> Annotated:
        row = self.rows[index] if row is None else row
        columns = self.columns
        values = {kind: part(row, column) for kind, column in columns.items()}
        name = file_of(values["image"]) or f"image {index} of {self.name}"
        if values.get(self.target, values.get("bbox")) is None:
            raise DataError(f"{name} has no {self.target}: leave it out, or add what is missing.")

        def read(kind: str, reader: Any, **options: Any) -> Any:
            if values.get(kind) is None:
                return None
            called = f"the {kind} of {name}" if kind != "image" else name
            try:
                return reader(values[kind], **options)
            except DataError as error:
                raise DataError(f"{called}: {error}") from error
            except BROKEN as error:
                raise DataError(f"{called} cannot be read: {error}.") from error

        image = read("image", read_rgb, within=self.within)
        mask = read("mask", read_mask, within=self.within)
        depth = read("depth", read_depth, scale=self.depth_scale, within=self.within)
        for kind, found in (("mask", mask), ("depth", depth)):
            if found is not None and found.shape != (image.height, image.width):
                raise DataError(
                    f"the {kind} of {name} has {found.shape[1]} x {found.shape[0]} pixels, but the picture has "
                    f"{image.width} x {image.height}: both must be of one size."
                )
        label = values.get("label")
        return Annotated(
            index=index,
            name=name,
            image=image,
            mask=mask,
            depth=depth,
            boxes=read("boxes", read_boxes) if "boxes" in columns else read("bbox", read_boxes, sizes=True),
            caption=values.get("caption"),
            label=None if label is None else int(label),
        )


class _Reader(torch.utils.data.Dataset):
    """What runs in the workers."""

    def __init__(self, source: AnnotatedSource) -> None:
        self.source = source

    def __getitem__(self, item: tuple[int, Any]) -> Annotated | DataError:
        """Returns an error instead of raising it: from a worker, it would arrive with a traceback in its text."""
        try:
            return self.source._read(*item)
        except DataError as error:
            return error


def _unchanged(picture: Any) -> Any:
    return picture


def open_annotated(
    data: str | Path | datasets.Dataset,
    target: Target,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    depth_scale: float | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> AnnotatedSource:
    """Open pictures with masks, depths or boxes.

    Args:
        data: The embedded "scenes", or a data set with columns as in `USUAL`.
        target: What every picture must have.
        split: Which part: "train" or "test" of the embedded ones.
        columns: Columns by what they hold (`USUAL`), where they have other names, such as ``{"mask": "labels"}``.
        depth_scale: Units of whole numbers in a metre: 1000 for millimetres, 256 for KITTI.
        max_images: Read at most this many: a random subset in order, or the first ones of a stream.
        seed: Decides which subset.

    Raises:
        DataError: There are no such pictures.
    """
    if isinstance(data, str) and data in TRAINING_SETS:
        rows, name = TRAINING_SETS[data](split or "test"), data  # pyright: ignore[reportArgumentType]
    else:
        rows, name = data, "data set"
    source = _of_rows(rows, target, columns=columns, name=name)
    if name == "scenes":
        source, depth_scale = replace(source, class_names=MASK_CLASSES), UNITS
    source = replace(source, depth_scale=depth_scale)
    return source if max_images is None else source.at_most(max_images, seed)


def _of_rows(data: Rows, target: Target, *, columns: Mapping[str, str] | None, name: str) -> AnnotatedSource:
    """Find the columns, and leave decoding to the reader."""
    data = data.with_format(None)
    features = features_of(data)
    found = {}
    for kind, usual in USUAL.items():
        there = [column for column in usual if column.partition(".")[0] in features]
        if kind == "label":
            there = [column for column in there if not isinstance(features[column], datasets.Image)]
        elif kind == "mask":
            there = [column for column in there if isinstance(features[column], datasets.Image)]
        if there:
            found[kind] = there[0]
    found |= columns or {}
    for column in {column for column in found.values() if isinstance(features.get(column), datasets.Image)}:
        data = data.cast_column(column, datasets.Image(decode=False))
    number = len(data) if isinstance(data, datasets.Dataset) else None
    return AnnotatedSource(
        name=name,
        num_images=number,
        target=target,
        columns=found,
        rows=data,
        picked=None if number is None else range(number),
    )
