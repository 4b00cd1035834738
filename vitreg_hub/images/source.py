"""Images from anywhere, batch by batch: what is measured on images reads them through here."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import EMBEDDED
from vitreg_hub.names import HUB_PREFIX

logger = logging.getLogger(__name__)

DEFAULT_SPLITS = ("test", "validation", "train")
"""Which split of a data set on the Hub is read if none is named: the first of these that there is."""

SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
"""Sub-folders that are no classes."""

FORMS = (
    f"an embedded data set ({', '.join(EMBEDDED)}), a folder, a data set on the Hub (org/name[:split]), "
    "a datasets.Dataset or IterableDataset, PIL images, or a tensor [N, 3, H, W]"
)

ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
"""``org/name[:split]``."""

# What Pillow raises for a file that is no image or a broken one.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

Transform = Callable[[Image.Image], Tensor]


class UnreadableError(DataError):
    """An image that cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Images of one step.

    Attributes:
        indices: [B] int64, which images of the source these are.
        images: [B, 3, H, W].
        labels: [B] int64, -1 where one is missing; None without labels.
        names: What the images are called: their files, where they have some, or else their indices.
        skipped: What is wrong with the images that were left out.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Images that can be read again and again; `open_images` makes it.

    Attributes:
        name: What the images are called.
        num_images: How many there are, None for a stream.
        has_labels: Whether every image has a label.
        label_names: Names of the classes, where they are known.
        rows: Where the images are: what an index, or for a stream iteration, gives.
        picked: Indices of the rows that are read; None for a stream.
        image_column: Column of the images, if rows have columns.
        label_column: Column of the labels.
    """

    name: str
    num_images: int | None
    has_labels: bool = False
    label_names: tuple[str, ...] | None = None
    rows: Any = field(repr=False)
    picked: Sequence[int] | None = field(default=None, repr=False)
    image_column: str | None = None
    label_column: str | None = None

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

        No more than the batches that are being made is held in memory. Of a stream, every process reads all, but
        decodes its own share only.

        Args:
            transform: Makes a tensor [3, H, W] of an RGB image. Images given as tensors pass by it.
            batch_size: Images per batch; the last one may have fewer.
            rank: Which of the processes this is.
            world_size: Number of processes.
            num_workers: Further processes that decode, 0 for none.
            skip_unreadable: Leave out images that cannot be read; batches may then be smaller, or empty and left out.

        Raises:
            DataError: An image cannot be read, unless that is skipped, or has another size than the others, a transform
                is needed, or a number makes no sense.
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
            collate_fn=_unchanged,
            generator=torch.Generator(),  # else every pass would move the global one
        )
        first = None
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            for what in batch.skipped:
                logger.warning("left out: %s", what)
            if not len(batch.images):
                continue
            first = first or batch
            self._require_equal(first.indices[0], first.images[0], batch.indices[0], batch.images[0])
            yield batch

    def at_most(self, number: int, *, seed: int = 0) -> Self:
        """No more than so many of these images: a random subset, in order, or the first ones of a stream."""
        if self.picked is None:
            return replace(self, rows=self.rows.take(number))
        if len(self.picked) <= number:
            return self
        places = np.sort(np.random.default_rng(seed).choice(len(self.picked), number, replace=False))
        return replace(self, picked=np.asarray(self.picked)[places], num_images=number)

    def _share(self, rank: int, world_size: int) -> Iterator[tuple[int, Any]]:
        """Yield (index, row) of one process's images. Rows that can be looked up are left to the workers."""
        if self.picked is not None:
            yield from ((int(index), None) for index in self.picked[rank::world_size])
            return
        yield from ((index, row) for index, row in enumerate(self.rows) if index % world_size == rank)

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
        """An error is returned: raised in a worker, it would arrive with a traceback in its text."""
        try:
            return self._batch(items)
        except DataError as error:
            return error

    def _batch(self, items: list[tuple[int, Any]]) -> Batch:
        source, indices, images, labels, names, skipped = self.source, [], [], [], [], []
        for index, row in items:
            row = source.rows[index] if row is None else row
            picture = row[source.image_column] if source.image_column else row
            try:
                images.append(self._image(index, picture))
            except UnreadableError as error:
                if not self.skip_unreadable:
                    raise
                skipped.append(str(error))
                continue
            indices.append(index)
            names.append(file_of(picture) or str(index))
            source._require_equal(indices[0], images[0], index, images[-1])
            if source.label_column:
                label = row[source.label_column]
                labels.append(-1 if label is None else int(label))
        return Batch(
            indices=torch.tensor(indices, dtype=torch.int64),
            images=torch.stack(images) if images else torch.empty(0),
            labels=torch.tensor(labels, dtype=torch.int64) if source.has_labels else None,
            names=tuple(names),
            skipped=tuple(skipped),
        )

    def _image(self, index: int, picture: Any) -> Tensor:
        if isinstance(picture, Tensor):
            return picture
        try:
            image = read_rgb(picture)
        except BROKEN as error:
            path = file_of(picture)
            file = f" ({path})" if path else ""
            raise UnreadableError(f"image {index} of {self.source.name}{file} cannot be read: {error}.") from error
        return self.transform(image)  # pyright: ignore[reportOptionalCall]  # tensors alone go without


def _unchanged(batch: Any) -> Any:
    return batch


def read_rgb(value: Any) -> Image.Image:
    """The picture in a column of images that `datasets` does not decode, or an opened one; raises `BROKEN`."""
    return to_rgb(datasets.Image().decode_example(value))


def file_of(value: Any) -> str | None:
    """File of such a picture, if it has one."""
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image: upright as its camera says, transparent pixels show white, of 16 bits the upper 8 are kept.

    Raises:
        ValueError: It is no image, or its pixels have no known range.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"it is {type(image).__name__}, no picture")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode} have no known range, save it with 8 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def open_images(
    images: Tensor | Sequence[Image.Image] | str | Path | datasets.Dataset | datasets.IterableDataset,
    *,
    name: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> ImageSource:
    """Open images of any of these forms; data sets on the Hub are streamed, nothing is copied to the disk.

    Args:
        images: A tensor [N, 3, H, W] that is already preprocessed; PIL images; a folder, of which sub-folders are
            classes if all images are in some; a data set with one column of images (or one called "image") and at most
            one of class labels (or whole numbers called "label"); the name of an embedded data set; or
            ``org/name[:split]`` on the Hub.
        name: What to call them, instead of what they are.
        max_images: Read no more: a random subset, in order, or the first ones of a stream.
        seed: Decides which subset.

    Raises:
        DataError: There are no such images.
    """
    if max_images is not None and max_images < 1:
        raise DataError(f"max_images is {max_images}: give at least 1, or None for all.")
    if isinstance(images, str | Path):
        called, images = _by_name(images)
        name = name or called
    if isinstance(images, datasets.Dataset | datasets.IterableDataset):
        source = _of_data_set(images)
    elif isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise DataError(
                f"images as a tensor must be [N, 3, H, W] of floating-point numbers that the model takes as they are, "
                f"not {images.dtype} {list(images.shape)}."
            )
        source = ImageSource(name="tensor", num_images=len(images), rows=images)
    elif isinstance(images, Sequence) and images and isinstance(images[0], Image.Image):
        source = ImageSource(name="pictures", num_images=len(images), rows=images)
    else:
        raise DataError(f"{type(images).__name__} is no form of images: give {FORMS}.")
    picked = None if source.num_images is None else range(source.num_images)
    source = replace(source, name=name or source.name, picked=picked)
    if source.num_images == 0:
        raise DataError(f"{source.name} holds no images.")
    return source if max_images is None else source.at_most(max_images, seed=seed)


def _of_data_set(data: datasets.Dataset | datasets.IterableDataset) -> ImageSource:
    """Find the columns, and leave decoding to the reader."""
    data = data.with_format(None)
    features = features_of(data)
    image = find_column(features, ["image"], lambda feature: isinstance(feature, datasets.Image))
    if image is None:
        raise DataError(
            f"the data set needs one column of images, or one called 'image', but its columns are {dict(features)}."
        )
    label = find_column(features, ["label"], lambda feature: isinstance(feature, datasets.ClassLabel))
    if label is None and is_integer(features.get("label")):
        label = "label"
    if data.features:
        data = data.select_columns([column for column in (image, label) if column])
        data = data.cast_column(image, datasets.Image(decode=False))
    return ImageSource(
        name=data.info.dataset_name or "data set",
        num_images=len(data) if isinstance(data, datasets.Dataset) else None,
        has_labels=label is not None,
        label_names=tuple(getattr(features[label], "names", ())) or None if label else None,
        rows=data,
        image_column=image,
        label_column=label,
    )


def find_column(features: Mapping[str, Any], usual: Sequence[str], wanted: Callable[[Any], bool]) -> str | None:
    """The only column of a kind, or of several the first with a usual name."""
    columns = [column for column, feature in features.items() if wanted(feature)]
    return columns[0] if len(columns) == 1 else next((name for name in usual if name in columns), None)


def is_integer(feature: Any) -> bool:
    """Whether a column holds whole numbers that are no class labels."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def features_of(data: datasets.Dataset | datasets.IterableDataset) -> Mapping[str, Any]:
    """Columns and their kinds; of a stream that does not tell them, those in its first row that are known here."""
    if data.features:
        return data.features
    row = next(iter(data), {})
    kinds = {Image.Image: datasets.Image(), int: datasets.Value("int64"), str: datasets.Value("string")}
    return {column: kinds[kind] for column, value in row.items() for kind in kinds if isinstance(value, kind)}


def _by_name(name: str | Path) -> tuple[str, datasets.Dataset | datasets.IterableDataset]:
    """What the images are called, and the images."""
    if isinstance(name, str) and name in EMBEDDED:
        return name, EMBEDDED[name]()
    if Path(name).is_dir():
        return str(name), image_folder(Path(name))
    if Path(name).exists():
        raise DataError(f"{name} is a file: give its folder, or the opened image in a list.")
    on_hub = ON_HUB.fullmatch(str(name).removeprefix(HUB_PREFIX))
    if on_hub and isinstance(name, str):
        repo_id, split = on_hub.groups()
        return hub_stream(repo_id, split)
    near = difflib.get_close_matches(str(name), EMBEDDED, n=1)
    hint = f", did you mean {near[0]!r}" if near else ""
    raise DataError(f"there are no images {str(name)!r}{hint}: give {FORMS}.")


def image_folder(root: Path) -> datasets.Dataset:
    """All images below a folder, in the order of their names. Only the names are held, and no cache is written."""
    paths = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "__MACOSX")))
        images = (file for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith("."))
        paths += [os.path.join(parent, file) for file in sorted(images)]
    if not paths:
        raise DataError(f"there are no images below {root}: their names must end in {', '.join(IMG_EXTENSIONS)}.")
    tops = [Path(path).relative_to(root).parts[:-1][:1] for path in paths]
    classes = sorted({top for (top,) in tops}) if all(tops) else []
    if classes and set(classes) <= SPLIT_FOLDERS:
        raise DataError(f"{root} holds the splits {', '.join(classes)}: give one of them, {root / classes[-1]}.")
    features: dict[str, Any] = {"image": datasets.Image()}
    if len(classes) < 2:
        return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features(features))
    features["label"] = datasets.ClassLabel(names=classes)
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[top] for (top,) in tops]
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=datasets.Features(features))


def hub_stream(
    repo_id: str, split: str | None, usual_splits: Sequence[str] = DEFAULT_SPLITS
) -> tuple[str, datasets.IterableDataset]:
    """The name of a data set on the Hub with its split, and its rows; without a split, the first usual one there is."""
    try:
        splits = datasets.load_dataset(repo_id, streaming=True)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"there is no folder {repo_id}, and the Hub does not give such a data set ({reason}): give {FORMS}."
        ) from error
    split = split or next((usual for usual in usual_splits if usual in splits), None)
    if split is None or split not in splits:
        raise DataError(
            f"{repo_id} has the splits {', '.join(map(str, splits))}: name one, as {repo_id}:{next(iter(splits))}."
        )
    return f"{repo_id}:{split}", splits[split]
