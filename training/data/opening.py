"""Opening training data and held-out data by name, through `datasets`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow.compute

from vitreg_hub.errors import DataError, readable
from vitreg_hub.images.data_sets import (
    MOST_CLASSES,
    Rows,
    features_of,
    find_column,
    is_integer,
    is_words,
    open_named,
    undecoded,
)
from vitreg_hub.images.embedded import TRAINING_SETS, Split
from vitreg_hub.images.pictures import file_of
from vitreg_hub.images.source import ImageSource
from vitreg_hub.training.data.packed import common_folder, open_packed, packed_files, require_whole_keys
from vitreg_hub.training.recipes.settings import DataSettings

FORMS = (
    f"an embedded set ({', '.join(TRAINING_SETS)}), a folder of images, parquet files, WebDataset shards "
    "(train-{0000..0099}.tar, also as URL), or org/name[:split] on the Hub"
)

IMAGE_COLUMNS = ("image", "jpg", "png")
LABEL_COLUMNS = ("label", "cls")
TEXT_COLUMNS = ("text", "txt", "caption")

HUB_SPLITS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation")}
"""The split to read on the Hub if none is named: the first of these that exists."""

MAX_SHARDS = 64
"""Largest number of shards into which local rows are divided to be read as a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Rows to train on, and their columns; made by `open_rows`.

    Attributes:
        rows: A `datasets.Dataset`, or an `IterableDataset` that is read from start to end.
        num_images: Number of images; None for a stream that does not say.
        columns: All columns, for messages.
        image_column: Column of images, not decoded.
        label_column: Column of class numbers, if there is one.
        text_column: Column of captions, or of lists of captions, if there is one.
        folder: The folder of pictures that they are, if they are one.
        shuffle_block: Rows of a stream that are held and shuffled at a time.
        within: Folder or URLs below which rows may name files, as in `read_rgb`.
    """

    name: str
    rows: Rows = field(repr=False)
    num_images: int | None
    columns: tuple[str, ...]
    image_column: str
    label_column: str | None = None
    text_column: str | None = None
    label_names: tuple[str, ...] | None = None
    num_classes: int | None = None
    folder: Path | None = None
    shuffle_block: int = 2048
    within: str | None = None

    @property
    def is_stream(self) -> bool:
        """Whether the rows can only be read in order, not by number."""
        return isinstance(self.rows, datasets.IterableDataset)

    @property
    def has_labels(self) -> bool:
        """Whether there is a column of labels."""
        return self.label_column is not None

    @property
    def has_texts(self) -> bool:
        """Whether there is a column of captions."""
        return self.text_column is not None

    def called(self, row: Mapping[str, Any], number: int) -> str:
        """Name of a row's image: its file, or its number."""
        value = row[self.image_column]
        path = file_of(value)
        if "__key__" in row:
            return f"{path or row['__key__']} in {Path(row['__url__']).name}"
        if path and not (isinstance(value, dict) and value.get("bytes")):
            return path
        return f"row {number}" + (f" ({path})" if path else "")


def as_stream(data: TrainingData, settings: DataSettings) -> TrainingData:
    """The same data as a stream, if `settings.streaming` asks for it and they are none."""
    if not settings.streaming or data.is_stream:
        return data
    rows = cast(datasets.Dataset, data.rows)
    return replace(data, rows=rows.to_iterable_dataset(num_shards=min(len(rows), MAX_SHARDS)))


def held_out_rows(settings: DataSettings, training: TrainingData) -> TrainingData | None:
    """Open the held-out data: `settings.test`, or the test part of an embedded set; None if there is neither.

    Columns of the settings that they lack are found by name and type. Labels get the training data's numbers by their
    names. Where one side has no names, numbers stay as they are.

    Raises:
        DataError: There are no such data, or they have classes that the training data do not have.
    """
    name = settings.test or (settings.train if settings.train in TRAINING_SETS else None)
    if name is None:
        return None
    held_out = open_rows(name, "test", settings, classes=training.label_names or ())
    if held_out.name == training.name and name not in TRAINING_SETS:  # whose parts differ
        raise DataError(f"{name} is what is trained on: give other images as data.test, or null for none.")
    return _numbered_as(training, held_out)


def as_image_source(data: TrainingData) -> ImageSource:
    """The same images in the form that evaluations take."""
    count = len(data.rows) if isinstance(data.rows, datasets.Dataset) else None
    return ImageSource(
        name=data.name,
        num_images=count,
        label_names=data.label_names,
        rows=data.rows,
        picked=None if count is None else range(count),
        image_column=data.image_column,
        label_column=data.label_column,
        within=data.within,
    )


def open_rows(name: str, split: Split, settings: DataSettings, *, classes: Collection[str] = ()) -> TrainingData:
    """Open rows and find their columns. Only for training must the columns of the settings exist.

    A single folder in a folder is a class if it is one of `classes`.

    Raises:
        DataError: There are no such data, or a column is missing.
    """
    training = split == "train"
    with readable(name, error=DataError):
        called, rows, folder, within = _rows(name, split, settings.streaming, classes)
    rows = rows.with_format(None)
    if isinstance(rows, datasets.Dataset):
        num_images = len(rows)
    else:
        num_images = _stream_length(rows)
        if num_images is None and training:
            num_images = settings.stream_images
    if num_images == 0:
        raise DataError(f"{called} holds no images.")
    if (settings.num_classes or 0) > max(MOST_CLASSES, num_images or 0):
        raise DataError(
            f"data.num_classes is {settings.num_classes}, which is more than {MOST_CLASSES:,} and the images."
        )
    features = features_of(rows)
    if "__key__" in features:
        require_whole_keys(called, features)

    def column(setting: str, usual: tuple[str, ...], wanted: Callable[[Any], bool], kind: str) -> str | None:
        chosen, fitting = getattr(settings, setting), [name for name in features if wanted(features[name])]
        if chosen is None or not (training or chosen in features):
            certain = [name for name in fitting if setting != "label_column" or not is_words(features[name])]
            return find_column(certain, usual)
        if chosen not in features:
            raise DataError(f"data.{setting} is {chosen!r}, but the columns of {called} are {', '.join(features)}.")
        if chosen not in fitting:
            raise DataError(f"data.{setting} is {chosen!r}, but that column of {called} does not hold {kind}.")
        return chosen

    image = column("image_column", IMAGE_COLUMNS, _is_image, "images")
    label = column("label_column", LABEL_COLUMNS, _is_label, "class labels, whole numbers or text")
    text = column("text_column", TEXT_COLUMNS, _is_text, "text")
    if image is None:
        raise DataError(f"{called} needs a column of images: name it as data.image_column ({', '.join(features)}).")
    if label is None and isinstance(rows, datasets.Dataset):
        label = next((name for name in LABEL_COLUMNS if is_words(features.get(name))), None)
    words = label is not None and is_words(features[label])
    if words and not isinstance(rows, datasets.Dataset):
        raise DataError(f"the labels of {called} are words, which a stream cannot number: leave data.streaming out.")
    others = [text, *(name for name in ("__key__", "__url__") if is_words(features.get(name)))]
    asked = label == settings.label_column
    rows, label, names = undecoded(rows, image=image, label=label, called=called, others=others)
    if words and asked and label is None:
        raise DataError(
            f"{called} has a different {settings.label_column} for nearly every image: name a column of classes."
        )
    return TrainingData(
        name=called,
        rows=rows,
        num_images=num_images,
        columns=tuple(features),
        image_column=image,
        label_column=label,
        text_column=text,
        label_names=names,
        num_classes=len(names or ()) or settings.num_classes or _count_classes(called, rows, label),
        folder=folder,
        shuffle_block=settings.shuffle_block,
        within=None if settings.allow_remote else within,
    )


def _stream_length(rows: datasets.IterableDataset) -> int | None:
    splits = rows.info.splits or {}
    if rows.split is None or rows.split not in splits:
        return None
    return splits[rows.split].num_examples or None


def _count_classes(called: str, rows: Rows, label: str | None) -> int | None:
    """One more than the largest label, if the rows are local."""
    if label is None or not isinstance(rows, datasets.Dataset):
        return None
    largest = pyarrow.compute.call_function("max", [rows.data.column(label)]).as_py()
    if largest is not None and largest >= max(MOST_CLASSES, len(rows)):
        raise DataError(
            f"{called} has the label {largest}, but only {len(rows):,} images: number classes from 0 without gaps, or "
            "store their names as text."
        )
    return None if largest is None else largest + 1


def _is_image(feature: Any) -> bool:
    """Whether a column holds images; files written by pandas only say how they are stored."""
    stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return stored or isinstance(feature, datasets.Image) or feature == datasets.Value("binary")


def _is_label(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or is_integer(feature) or is_words(feature)


def _is_text(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")


def _rows(
    name: str, split: Split, streaming: bool, classes: Collection[str]
) -> tuple[str, Rows, Path | None, str | None]:
    """The name of the data, their rows, their folder if it holds pictures, and below what rows may name files."""
    if name not in TRAINING_SETS and (files := packed_files(name)):
        return name, open_packed(name, files, streaming), None, common_folder(files)
    sets = {known: partial(make, split) for known, make in TRAINING_SETS.items()}
    return open_named(name, sets=sets, splits=HUB_SPLITS[split], wanted="training data", forms=FORMS, classes=classes)


def _numbered_as(training: TrainingData, held_out: TrainingData) -> TrainingData:
    """Give the held-out data the class numbers of the training data."""
    wanted, own, label = training.label_names, held_out.label_names, held_out.label_column
    if not (wanted and own and label):
        if training.num_classes and held_out.num_classes and held_out.num_classes > training.num_classes:
            raise DataError(
                f"{held_out.name} has labels up to {held_out.num_classes - 1}, but {training.name} has "
                f"{training.num_classes} classes: hold out images of the same classes."
            )
        return held_out
    if wanted == own:
        return held_out
    if unknown := [name for name in own if name not in wanted]:
        raise DataError(
            f"{held_out.name} has the class {unknown[0]!r}, which {training.name} does not have: hold out images of "
            f"the same {len(wanted)} classes."
        )
    feature = datasets.ClassLabel(names=list(wanted))
    renumber = partial(_renumbered, label, [wanted.index(name) for name in own])
    if isinstance(held_out.rows, datasets.Dataset):
        labels = [renumber({label: number})[label] for number in held_out.rows[label]]
        rows = held_out.rows.remove_columns(label).add_column(label, labels, feature=feature)
    else:
        rows = held_out.rows.map(
            renumber, features=datasets.Features({**(held_out.rows.features or {}), label: feature})
        )
    return replace(held_out, rows=rows, label_names=wanted, num_classes=len(wanted))


def _renumbered(label: str, numbers: list[int], row: dict[str, Any]) -> dict[str, Any]:
    known = row[label] is not None and row[label] >= 0
    return row | {label: numbers[row[label]] if known else None}
