"""Pictures with masks, depths or boxes, one by one: what dense predictions are trained on and scored by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import ON_HUB, Rows, features_of, hub_stream, is_integer
from vitreg_hub.images.detection import VocXml, box_rows
from vitreg_hub.images.known import KNOWN, known_data
from vitreg_hub.images.paired import aliases, paired_rows
from vitreg_hub.images.pictures import BROKEN, file_of, read_rgb
from vitreg_hub.images.scenes import MASK_CLASSES, PER_CLASS, UNITS, scenes
from vitreg_hub.images.targets import part, read_boxes, read_depth, read_mask
from vitreg_hub.names import HUB_PREFIX

Target = Literal["mask", "depth", "boxes"]

USUAL_SPLITS = ("validation", "val", "test", "train")
"""Splits on the Hub; if none is named, the first of these that exists is read: tests often come without annotations."""

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
        known: Mapping[str, Any] = self.rows[index] if row is None else row
        values = {kind: part(known, column) for kind, column in self.columns.items()}
        for kind in ("image", "mask", "depth"):
            if isinstance(values.get(kind), str):  # a file that a row names, which may be a stranger's
                values[kind] = {"bytes": None, "path": values[kind]}
        if isinstance(values.get("boxes"), VocXml):
            values["boxes"] = values["boxes"].boxes()
        file = values["image"] if isinstance(values["image"], Path) else file_of(values["image"])
        name = str(file or f"image {index} of {self.name}")
        for kind in ("image", "bbox" if self.target == "boxes" and "bbox" in self.columns else self.target):
            if values[kind] is None:
                raise DataError(f"{name} has no {kind}: leave it out, or add what is missing.")

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
        depth = None
        if self.target == "depth" or self.depth_scale:
            depth = read("depth", read_depth, scale=self.depth_scale, within=self.within)
        for kind, found in (("mask", mask), ("depth", depth)):
            if found is not None and found.shape != (image.height, image.width):
                raise DataError(
                    f"the {kind} of {name} has {found.shape[1]} x {found.shape[0]} pixels, but the picture has "
                    f"{image.width} x {image.height}: both must be of one size."
                )
        return Annotated(
            index=index,
            name=name,
            image=image,
            mask=mask,
            depth=depth,
            boxes=read("boxes", read_boxes) if "boxes" in self.columns else read("bbox", read_boxes, sizes=True),
            caption=values.get("caption"),
            label=read("label", int),
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
    data: str | Path | Rows,
    target: Target,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    depth_scale: float | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> AnnotatedSource:
    """Open pictures with masks, depths or boxes. Data sets on the Hub are streamed: nothing is copied to the disk.

    Args:
        data: The embedded "scenes"; a data set with columns as in `USUAL`; a folder with paired folders, as
            `paired.paired_rows` takes; for boxes also a folder as Pascal VOC has it, or a COCO JSON file or its folder;
            a name in `known.KNOWN`, or ``org/name`` on the Hub, each also with ``:split``.
        target: What every picture must have.
        split: Which part, if there are several.
        columns: Columns by what they hold (`USUAL`), where they have other names, such as ``{"mask": "labels"}``.
        depth_scale: Units of whole numbers in a metre: 1000 for millimetres, 256 for KITTI.
        max_images: Read at most this many: a random subset in order, or the first ones of a stream.
        seed: Decides which subset.

    Raises:
        DataError: There are no such pictures.
    """
    if target not in get_args(Target):
        raise DataError(f"{target!r} is no target: give {', '.join(get_args(Target))}.")
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images is {max_images}: give at least 1, or None for all.")
    if depth_scale is not None and not depth_scale > 0:
        raise DataError(f"depth_scale is {depth_scale}: give the units in a metre, such as 1000 for millimetres.")
    if unknown := sorted(set(columns or {}) - set(USUAL)):
        raise DataError(f"columns may say where {', '.join(USUAL)} are, not {', '.join(unknown)}.")
    if isinstance(data, str | Path):
        source = _named(str(data), target, split, columns)
    else:
        source = _of_rows(data, target, columns=columns, name=data.info.dataset_name or "data set")
    if source.num_images == 0:
        raise DataError(f"{source.name} holds no pictures.")
    source = replace(source, depth_scale=depth_scale or source.depth_scale)
    return source if max_images is None else source.at_most(max_images, seed)


def _named(name: str, target: Target, split: str | None, columns: Mapping[str, str] | None) -> AnnotatedSource:
    """What a name stands for."""
    path, (word, _, after) = Path(name), name.removeprefix(HUB_PREFIX).partition(":")
    split = split or after or None
    if word == "scenes":
        part_of = next((known for known in PER_CLASS if known in aliases(split or "test")), None)
        if part_of is None:
            raise DataError(f"scenes have the splits {', '.join(PER_CLASS)}, not {split}: give one of them.")
        source = _of_rows(scenes(part_of), target, columns=columns, name=name)  # pyright: ignore[reportArgumentType]
        return replace(source, class_names=MASK_CLASSES, depth_scale=UNITS)
    if path.is_dir() or (target == "boxes" and path.is_file()):
        if target == "boxes":
            rows, within = box_rows(path, split)
        else:
            rows, within = paired_rows(path, target, split), path
        return AnnotatedSource(
            name=name,
            num_images=len(rows),
            target=target,
            columns={kind: kind for kind in rows[0]} if rows else {},
            rows=rows,
            picked=range(len(rows)),
            within=str(within),
        )
    known = known_data(word)
    if known is None and not ON_HUB.fullmatch(word):
        raise DataError(
            f"there are no pictures {name!r}: give scenes, a folder, {', '.join(KNOWN)}, or a data set on the Hub "
            "(org/name[:split])."
        )
    options = {"name": known.config, "revision": known.revision} if known else {}
    options = {key: value for key, value in options.items() if value is not None}
    called, rows, within = hub_stream(known.repo_id if known else word, split, USUAL_SPLITS, **options)
    source = _of_rows(rows, target, columns={**(known.columns if known else {}), **(columns or {})}, name=called)
    return replace(source, class_names=known.class_names if known else None, within=within)


def _of_rows(data: Rows, target: Target, *, columns: Mapping[str, str] | None, name: str) -> AnnotatedSource:
    """Find the columns, and leave decoding to the reader."""
    data = data.with_format(None)
    features = features_of(data)
    chosen = {kind: column for kind, column in (columns or {}).items() if column is not None}
    if missing := [column for column in chosen.values() if column.partition(".")[0] not in features]:
        raise DataError(f"{name} has no column {missing[0]}, but {', '.join(features)}: give one of them.")
    if {"boxes", "bbox"} <= chosen.keys():
        raise DataError("columns name both boxes (corners) and bbox (widths and heights): give what the data hold.")
    found = {kind: column for kind, column in _usual(features).items() if column not in chosen.values()}
    if {"boxes", "bbox"} & chosen.keys():
        found = {kind: column for kind, column in found.items() if kind not in ("boxes", "bbox")}
    found |= chosen
    if lacking := [
        kind for kind in ("image", target) if kind not in found and not (kind == "boxes" and "bbox" in found)
    ]:
        raise DataError(
            f"{name} has no column of the {lacking[0]} that is known, but {', '.join(features)}: say which it is by "
            f"columns, as {{'{lacking[0]}': '{next(iter(features), 'name')}'}}."
        )
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


def _usual(features: Mapping[str, Any]) -> dict[str, str]:
    """Columns with usual names, of the kind that belongs to the name."""
    found: dict[str, str] = {}
    for kind, usual in USUAL.items():
        for column in usual:
            outer, _, inner = column.partition(".")
            is_image = isinstance(features.get(outer), datasets.Image)
            is_class = isinstance(features.get(outer), datasets.ClassLabel) or is_integer(features.get(outer))
            fits = {"image": is_image, "mask": is_image, "label": is_class}.get(kind, True)
            if outer in features and fits and (not inner or inner in str(features[outer])):
                found.setdefault(kind, column)
    if "boxes" in found:
        found.pop("bbox", None)
    return found


def require_classes(
    picture: Annotated, num_classes: int, *, ignore_index: int = IGNORED, reduce_zero_label: bool = False
) -> None:
    """Refuse a mask with a label outside of the classes.

    Args:
        picture: A picture with its mask.
        num_classes: Classes count from 0, or from 1 if the zero label is reduced, as in ADE20k.
        ignore_index: The label of pixels that count nowhere.
        reduce_zero_label: The label 0 counts nowhere, and 1 is the first class.

    Raises:
        DataError: There is such a label, or no mask.
    """
    if picture.mask is None:
        raise DataError(f"{picture.name} has no mask: leave it out, or add what is missing.")
    first = int(reduce_zero_label)
    labels = np.unique(picture.mask)
    odd = [label for label in labels.tolist() if not 0 <= label < first + num_classes and label != ignore_index]
    if odd:
        raise DataError(
            f"the mask of {picture.name} has the label {odd[0]}, but {num_classes} classes are numbered from {first} "
            f"to {first + num_classes - 1}, and {ignore_index} is ignored: relabel it, or give the right number."
        )
