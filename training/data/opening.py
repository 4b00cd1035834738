"""Opening training data and held-out data by name, through `datasets`."""

import difflib
import json
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import datasets
import pyarrow.compute
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from vitreg_hub.errors import DataError, readable
from vitreg_hub.images.data_sets import (
    MOST_CLASSES,
    ON_HUB,
    SPLIT_FOLDERS,
    Rows,
    features_of,
    find_column,
    hub_stream,
    image_folder,
    is_integer,
    is_words,
    numbered,
    require_names,
)
from vitreg_hub.images.embedded import TRAINING_SETS, Split
from vitreg_hub.images.pictures import file_of
from vitreg_hub.images.source import ImageSource, open_images
from vitreg_hub.names import HUB_PREFIX
from vitreg_hub.training.recipes.settings import DataSettings

FORMS = (
    f"an embedded set ({', '.join(TRAINING_SETS)}), a folder of images, parquet files, WebDataset shards "
    "(train-{0000..0099}.tar, also as URL), or org/name[:split] on the Hub"
)

READERS = {".tar": "webdataset", ".parquet": "parquet"}
"""Builders of `datasets` by the ending of the files."""

IMAGE_COLUMNS = ("image", "jpg", "png")
LABEL_COLUMNS = ("label", "cls")
TEXT_COLUMNS = ("text", "txt", "caption")

HUB_SPLITS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation")}
"""The split to read on the Hub if none is named: the first of these that exists."""

MOST_FILES = 100_000
"""Of one name with braces."""

MAX_SHARDS = 64
"""Largest number of shards into which local rows are divided to be read as a stream."""

UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ImportError)
UNREADABLE += (ArithmeticError, MemoryError, struct.error, zlib.error, pickle.UnpicklingError, tarfile.TarError)
UNREADABLE += (DatasetsError,)
"""What `datasets` raises, even in the middle of a stream, for files that are broken, of another kind or out of reach:
it decodes all members of an archive, also those that nobody asks for."""

INFLATED, PER_BYTE = 2**29, 100
"""Bytes that a group of rows of parquet may have unpacked, and from then on for each byte of the file: pictures are
packed already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Rows to train on, and their columns; made by `open_training_data`.

    Attributes:
        name: Name of the data.
        rows: A `datasets.Dataset`, or an `IterableDataset` that is read from start to end.
        num_images: Number of images; None for a stream that does not say.
        columns: All columns, for messages.
        image_column: Column of images, not decoded.
        label_column: Column of class numbers, if there is one.
        text_column: Column of captions, or of lists of captions, if there is one.
        label_names: Names of the classes, where they are known.
        num_classes: Number of classes, where it is known.
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


def open_training_data(settings: DataSettings) -> TrainingData:
    """Open the training data. Nothing is downloaded: shards, URLs and sets on the Hub are streamed.

    Local parquet files are read by index, for which `datasets` converts them in its cache, unless
    `settings.streaming`.

    Raises:
        DataError: There are no such data, or a column is missing.
    """
    return as_stream(open_rows(settings.train, "train", settings), settings)


def as_stream(data: TrainingData, settings: DataSettings) -> TrainingData:
    """The same data as a stream, if `settings.streaming` asks for it and they are none."""
    if not settings.streaming or data.is_stream:
        return data
    rows = cast(datasets.Dataset, data.rows)
    return replace(data, rows=rows.to_iterable_dataset(num_shards=min(len(rows), MAX_SHARDS)))


def open_held_out(settings: DataSettings, training: TrainingData) -> ImageSource | None:
    """Open the held-out data in the form that evaluations take; as `held_out_rows`."""
    held_out = held_out_rows(settings, training)
    return held_out and as_image_source(held_out)


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
    rows = data.rows
    if rows.features:
        usual = {data.image_column: "image"}
        if data.label_column:
            usual[data.label_column] = "label"
        renamed = {old: new for old, new in usual.items() if old != new}
        rows = rows.select_columns(list(usual)).rename_columns(renamed)
    return replace(open_images(rows, name=data.name), within=data.within)


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
    names, columns = getattr(features[label], "names", None) if label else None, tuple(features)
    if label and is_words(features[label]):
        rows, label, names = _numbered(called, rows, label, asked=label == settings.label_column)
        features = features_of(rows)
    require_names(names, called)
    if rows.features:
        kept = [image, label, text, *(name for name in ("__key__", "__url__") if is_words(features.get(name)))]
        rows = rows.select_columns([name for name in kept if name in features])
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return TrainingData(
        name=called,
        rows=rows,
        num_images=num_images,
        columns=columns,
        image_column=image,
        label_column=label,
        text_column=text,
        label_names=tuple(names) if names else None,
        num_classes=len(names or ()) or settings.num_classes or _count_classes(called, rows, label),
        folder=folder,
        shuffle_block=settings.shuffle_block,
        within=None if settings.allow_remote else within,
    )


def _numbered(called: str, rows: Rows, label: str, *, asked: bool) -> tuple[Rows, str | None, tuple[str, ...] | None]:
    """As `numbered`; refuses what cannot be numbered if it was asked for."""
    if not isinstance(rows, datasets.Dataset):
        raise DataError(f"the labels of {called} are words, which a stream cannot number: leave data.streaming out.")
    rows, number, names = numbered(rows, label)
    if asked and number is None:
        raise DataError(f"{called} has a different {label} for nearly every image: name a column of classes.")
    return rows, number, names


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
    if name in TRAINING_SETS:
        return name, TRAINING_SETS[name](split), None, None
    if files := _files(name):
        return name, _of_files(name, files, streaming), None, _common_folder(files)
    if os.path.isdir(name):
        return name, image_folder(Path(name), classes=classes), Path(name), None
    if on_hub := ON_HUB.fullmatch(name.removeprefix(HUB_PREFIX)):
        repo_id, named = on_hub.groups()
        called, rows, within = hub_stream(repo_id, named, HUB_SPLITS[split])
        return called, rows, None, within
    near = difflib.get_close_matches(name, TRAINING_SETS, n=1)
    hint = f", did you mean {near[0]!r}" if near else ""
    raise DataError(f"there are no training data {name!r}{hint}: give {FORMS}.")


def _of_files(name: str, files: list[str], streaming: bool) -> Rows:
    reader = READERS[_ending(files[0])]
    for file in files:
        if "://" not in file:
            _require_sound(name, file, reader)
    streaming = streaming or reader == "webdataset" or any("://" in file for file in files)
    try:
        return datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as {reader}: {reason(error)}.") from error


def _common_folder(files: Sequence[str]) -> str:
    """The folder that all files share, or the start of the first URL."""
    if all("://" not in file for file in files):
        return os.path.commonpath([os.path.dirname(file) for file in files])
    return files[0].rpartition("/")[0] + "/"


def _require_sound(name: str, file: str, reader: str) -> None:
    """Refuse a local file that would block, or whose footer asks for far more memory than its size explains."""
    if not Path(file).is_file():
        raise DataError(f"{file} is not an ordinary file: give files, or their folder.")
    if reader != "parquet":
        return
    try:
        footer = pyarrow.parquet.read_metadata(file)
        features = list(_objects(json.loads((footer.metadata or {}).get(b"huggingface", b"{}"))))
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as parquet: {reason(error)}.") from error
    size = Path(file).stat().st_size
    largest = max((footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0)
    if footer.num_rows > size or largest > max(INFLATED, PER_BYTE * size):
        raise DataError(
            f"{file} says that its {size:,} bytes hold {footer.num_rows:,} rows, of up to {largest:,} bytes together: "
            "it is damaged, or made to fill the memory."
        )
    if any(f.get("_type") == "ClassLabel" and not isinstance(f.get("names"), list) for f in features):
        raise DataError(f"{file} has class labels without their names: store the names in its column.")


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """Every object in JSON, at any depth."""
    if isinstance(content, dict):
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _objects(inner)


def reason(error: BaseException) -> str:
    """First line of an error's text, without the full stop."""
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(".")


def _files(name: str) -> list[str]:
    """Shards or parquet files of a path, pattern or folder; empty if it is something else."""
    if os.path.isdir(name):
        files = []
        for ending in READERS:
            files = files or sorted(str(file) for file in Path(name).glob(f"*{ending}"))
        splits = sorted({re.split(r"[-_.\d]", Path(file).name)[0] for file in files} & SPLIT_FOLDERS)
        if len(splits) > 1:
            pattern = Path(name) / f"{splits[-1]}*{_ending(files[0])}"
            raise DataError(f"{name} holds the splits {', '.join(splits)}: give the files of one, such as {pattern}.")
        return files
    if _ending(name) not in READERS:
        return []
    paths = list(islice(_braces(name), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise DataError(f"{name} stands for more than {MOST_FILES:,} files: give fewer.")
    return [file for path in dict.fromkeys(paths) for file in _matches(path, name)]


def _ending(name: str) -> str:
    return Path(urlsplit(name).path if "://" in name else name).suffix


def _matches(path: str, name: str) -> list[str]:
    if "://" in path:
        if "*" in path:
            raise DataError(
                f"{name} is a URL, whose files cannot be listed: count them, as in train-{{0000..0099}}.tar."
            )
        return [path]
    files = [path] if os.path.exists(path) else sorted(glob(path, recursive=True))
    if not files:
        raise DataError(f"there is no file {path}" + (f", which {name} asks for." if path != name else "."))
    return [str(Path(file).absolute()) for file in files]


def _braces(pattern: str) -> Iterator[str]:
    """Yield all names of a pattern with ``{first..last}`` or ``{one,other}``, as in a shell."""
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    first, last, several = match.groups()
    if not several and max(len(first), len(last)) > 18:
        raise DataError(f"{pattern} stands for more than {MOST_FILES:,} files: give fewer.")
    if not several and int(first) > int(last):
        raise DataError(f"{pattern} counts from {first} to {last}: give the smaller number first.")
    inner = several.split(",") if several else (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    for part in inner:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])


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
