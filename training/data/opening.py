"""Opening training data and held-out data by name, through `datasets`."""

import difflib
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import pyarrow.compute
from datasets.exceptions import DatasetsError

from vitreg_hub.errors import DataError, readable
from vitreg_hub.images.data_sets import (
    ON_HUB,
    SPLIT_FOLDERS,
    Rows,
    features_of,
    find_column,
    hub_stream,
    image_folder,
    is_integer,
)
from vitreg_hub.images.embedded import TRAINING_SETS, Split
from vitreg_hub.images.source import ImageSource, file_of, open_images
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

UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, IndexError, tarfile.TarError, DatasetsError)
"""What `datasets` raises, even in the middle of a stream, for files that are broken, of another kind or out of reach;
IndexError for an empty archive."""


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
        shuffle_block: Rows of a stream that are held and shuffled at a time.
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
    shuffle_block: int = 2048

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
    with readable(settings.train, error=DataError):
        return _open(settings.train, "train", settings)


def open_held_out(settings: DataSettings, training: TrainingData) -> ImageSource | None:
    """Open the held-out data: `settings.test`, or the test part of an embedded set; None if there is neither.

    Columns of the settings that they lack are found by name and type. Labels get the training data's numbers by their
    names. Where one side has no names, numbers stay as they are.

    Raises:
        DataError: There are no such data, or they have classes that the training data do not have.
    """
    name = settings.test or (settings.train if settings.train in TRAINING_SETS else None)
    if name is None:
        return None
    with readable(name, error=DataError):
        held_out = _open(name, "test", settings)
    if held_out.name == training.name and name not in TRAINING_SETS:  # whose parts differ
        raise DataError(f"{name} is what is trained on: give other images as data.test, or null for none.")
    return as_image_source(_numbered_as(training, held_out))


def as_image_source(data: TrainingData) -> ImageSource:
    """The same images in the form that evaluations take."""
    rows = data.rows
    if rows.features:
        usual = {data.image_column: "image"}
        if data.label_column:
            usual[data.label_column] = "label"
        renamed = {old: new for old, new in usual.items() if old != new}
        rows = rows.select_columns(list(usual)).rename_columns(renamed)
    return open_images(rows, name=data.name)


def _open(name: str, split: Split, settings: DataSettings) -> TrainingData:
    """Open rows and find their columns.

    Only for training must the columns of the settings exist, and can local rows become a stream: evaluations take
    random subsets.
    """
    training = split == "train"
    called, rows = _rows(name, split, settings.streaming)
    rows = rows.with_format(None)
    if isinstance(rows, datasets.Dataset):
        num_images = len(rows)
    else:
        num_images = _stream_length(rows)
        if num_images is None and training:
            num_images = settings.stream_images
    if num_images == 0:
        raise DataError(f"{called} holds no images.")
    if training and settings.streaming and isinstance(rows, datasets.Dataset):
        rows = rows.to_iterable_dataset(num_shards=min(len(rows), MAX_SHARDS))
    features = features_of(rows)

    def column(setting: str, usual: tuple[str, ...], wanted: Callable[[Any], bool], kind: str) -> str | None:
        chosen, fitting = getattr(settings, setting), [name for name in features if wanted(features[name])]
        if chosen is None or not (training or chosen in features):
            return find_column(fitting, usual)
        if chosen not in features:
            raise DataError(f"data.{setting} is {chosen!r}, but the columns of {called} are {', '.join(features)}.")
        if chosen not in fitting:
            raise DataError(f"data.{setting} is {chosen!r}, but that column of {called} does not hold {kind}.")
        return chosen

    image = column("image_column", IMAGE_COLUMNS, _is_image, "images")
    label = column("label_column", LABEL_COLUMNS, _is_label, "class labels or whole numbers")
    text = column("text_column", TEXT_COLUMNS, _is_text, "text")
    if image is None:
        raise DataError(f"{called} needs a column of images: name it as data.image_column ({', '.join(features)}).")
    if rows.features:
        kept = [image, label, text, "__key__", "__url__"]
        rows = rows.select_columns([name for name in kept if name in features])
        rows = rows.cast_column(image, datasets.Image(decode=False))
    names = tuple(getattr(features[label], "names", None) or ()) if label else ()
    return TrainingData(
        name=called,
        rows=rows,
        num_images=num_images,
        columns=tuple(features),
        image_column=image,
        label_column=label,
        text_column=text,
        label_names=names or None,
        num_classes=len(names) or settings.num_classes or _count_classes(rows, label),
        shuffle_block=settings.shuffle_block,
    )


def _stream_length(rows: datasets.IterableDataset) -> int | None:
    splits = rows.info.splits or {}
    if rows.split is None or rows.split not in splits:
        return None
    return splits[rows.split].num_examples or None


def _count_classes(rows: Rows, label: str | None) -> int | None:
    """One more than the largest label, if the rows are local."""
    if label is None or not isinstance(rows, datasets.Dataset):
        return None
    largest = pyarrow.compute.call_function("max", [rows.data.column(label)]).as_py()
    return None if largest is None else largest + 1


def _is_image(feature: Any) -> bool:
    """Whether a column holds images; files written by pandas only say how they are stored."""
    stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return stored or isinstance(feature, datasets.Image) or feature == datasets.Value("binary")


def _is_label(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or is_integer(feature)


def _is_text(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")


def _rows(name: str, split: Split, streaming: bool) -> tuple[str, Rows]:
    """The name of the data, and their rows."""
    if name in TRAINING_SETS:
        return name, TRAINING_SETS[name](split)
    if files := _files(name):
        return name, _of_files(name, files, streaming)
    if Path(name).is_dir():
        return name, image_folder(Path(name))
    if on_hub := ON_HUB.fullmatch(name.removeprefix(HUB_PREFIX)):
        repo_id, named = on_hub.groups()
        return hub_stream(repo_id, named, HUB_SPLITS[split])
    near = difflib.get_close_matches(name, TRAINING_SETS, n=1)
    hint = f", did you mean {near[0]!r}" if near else ""
    raise DataError(f"there are no training data {name!r}{hint}: give {FORMS}.")


def _of_files(name: str, files: list[str], streaming: bool) -> Rows:
    reader = READERS[_ending(files[0])]
    streaming = streaming or reader == "webdataset" or any("://" in file for file in files)
    try:
        return datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as {reader}: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """First line of an error's text, without the full stop."""
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(".")


def _files(name: str) -> list[str]:
    """Shards or parquet files of a path, pattern or folder; empty if it is something else."""
    if Path(name).is_dir():
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
    files = [path] if Path(path).exists() else sorted(glob(path, recursive=True))
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
