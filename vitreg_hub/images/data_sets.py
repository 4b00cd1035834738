"""Data sets of images as `datasets` has them: folders, the Hub, and which column is what."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.errors import DataError
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.images.embedded import EMBEDDED
from vitreg_hub.names import HUB_PREFIX

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
"""Names of sub-folders that are splits, not classes."""

HIDDEN = (".", "__MACOSX")
"""How the names of folders begin that nobody means."""

FORMS = (
    f"an embedded data set ({', '.join(EMBEDDED)}), a folder, a data set on the Hub (org/name[:split]), "
    "a datasets.Dataset or IterableDataset, PIL images, or tensors [3, H, W]"
)
"""What a user may give as images."""

ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
"""``org/name[:split]``."""

Rows = datasets.Dataset | datasets.IterableDataset

MOST_CLASSES = 100_000
"""Classes that any data may have; a head of more needs as many images, or a number misread would fill the memory."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and what stands for the bytes of names that are not UTF-8."""


def image_folder(root: Path, *, classes: Collection[str] = ()) -> datasets.Dataset:
    """All images below a folder, in the order of their names. Only names are in memory, and no cache is written.

    Folders in it are classes if they hold most of the images and are several, or one of these `classes`; images beside
    them then have no label.
    """
    paths = images_below(root)
    inside = [Path(path).relative_to(root).parts for path in paths]
    folders = [parts[0] if len(parts) > 1 else None for parts in inside]
    found = sorted({folder for folder in folders if folder is not None})
    if 2 * folders.count(None) >= len(paths):
        found = []
    if found and set(found) <= SPLIT_FOLDERS:
        raise DataError(f"{root} holds the splits {', '.join(found)}: give one of them, {root / found[-1]}.")
    features: dict[str, Any] = {"image": datasets.Image()}
    if len(found) < 2 and not set(found) & set(classes):
        return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features(features))
    features["label"] = datasets.ClassLabel(names=found)
    number = {name: i for i, name in enumerate(found)}
    labels = [None if folder is None else number[folder] for folder in folders]
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=datasets.Features(features))


def image_files(given: Sequence[str | Path]) -> datasets.Dataset:
    """Image files, and all that are below folders, as they were given; none is looked at.

    Raises:
        DataError: There are no images below a folder, or a name cannot be shown.
    """
    paths: list[str] = []
    for path in given:
        paths += images_below(Path(path)) if os.path.isdir(path) else [str(path)]
    _require_printable(paths)
    return datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))


def images_below(root: Path) -> list[str]:
    """The files of all images below a folder, in the order of their names.

    Raises:
        DataError: There are none, or a name cannot be shown.
    """
    paths = [file for file in files_below(root) if file.lower().endswith(IMG_EXTENSIONS)]
    if not paths:
        model = " (it holds a model, which is no data)" if Path(root, CONFIG_FILE).is_file() else ""
        raise DataError(
            f"there are no images below {root}{model}: their names must end in {', '.join(IMG_EXTENSIONS)}."
        )
    _require_printable(paths)
    return paths


def _require_printable(paths: Sequence[str]) -> None:
    if odd := next(filter(UNPRINTABLE.search, paths), None):
        raise DataError(f"the name {odd!a} is not UTF-8 or holds control characters: rename the file or folder.")


def files_below(root: Path) -> Iterator[str]:
    """Yield all files below a folder but hidden ones, in the order of their names.

    A link to a folder that is read anyway is not followed, but named: its pictures would count twice, or without end.
    """
    top, known = root.resolve(), set()
    for parent, below, files in os.walk(root, followlinks=True, onerror=_unreadable):
        real = Path(parent).resolve()
        is_link = os.path.islink(parent) and parent != str(root)
        if real in known or (is_link and (real.is_relative_to(top) or top.is_relative_to(real))):
            logger.warning("%s is a link to a folder that is read anyway, and is not followed", parent)
            below.clear()
            continue
        known.add(real)
        below[:] = sorted(folder for folder in below if not folder.startswith(HIDDEN))
        yield from (os.path.join(parent, file) for file in sorted(files) if not file.startswith("."))


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder but hidden ones, in the order of their names."""
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(HIDDEN)]


def why_unlabelled(root: Path) -> str:
    """Why the images of a folder have no classes, and what to do."""
    folders = [folder.name for folder in folders_in(root) if any(files_below(folder))]
    if len(folders) == 1 and any(entry.is_dir() for entry in os.scandir(root / folders[0])):
        return f"all of them lie in its one folder {folders[0]}: give {root / folders[0]}"
    if not folders:
        return "they lie in no folders: put those of each class into a folder with its name"
    if len(folders) == 1:
        return f"all of them lie in the folder {folders[0]}: add a folder for each other class"
    return f"some lie beside the folders {folders[0]}, {folders[1]}, ...: put every image into the folder of its class"


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror}): look at its permissions.") from error


def hub_stream(
    repo_id: str, split: str | None, usual_splits: Sequence[str], **options: Any
) -> tuple[str, datasets.IterableDataset, str]:
    """Name and rows of a split on the Hub, and the start of the URLs of its own files.

    If no split is given, it is the first usual one that exists. Options, such as a revision, are those of `datasets`.
    """
    try:
        splits = datasets.load_dataset(repo_id, streaming=True, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"there is no folder {repo_id}, and no such data set on the Hub can be read ({reason}): give {FORMS}."
        ) from error
    split = split or next((usual for usual in usual_splits if usual in splits), None)
    if split is None or split not in splits:
        raise DataError(
            f"{repo_id} has the splits {', '.join(map(str, splits))}: name one, as {repo_id}:{next(iter(splits))}."
        )
    return f"{repo_id}:{split}", splits[split], f"hf://datasets/{repo_id}@"


def open_named(
    name: str | Path,
    *,
    sets: Mapping[str, Callable[[], datasets.Dataset]],
    splits: Sequence[str],
    wanted: str,
    forms: str = FORMS,
    classes: Collection[str] = (),
) -> tuple[str, Rows, Path | None, str | None]:
    """Open one of the embedded `sets`, a folder, or ``org/name[:split]`` on the Hub, where `splits` are the usual ones.

    Returns:
        What the rows are called, the rows, their folder if they are in one, and below which URLs they may name files.

    Raises:
        DataError: There are no such rows; the message says what was `wanted`, and the `forms` that it may have.
    """
    if name in sets:
        return str(name), sets[str(name)](), None, None
    if os.path.isdir(name):
        return str(name), image_folder(Path(name), classes=classes), Path(name), None
    if isinstance(name, str) and (on_hub := ON_HUB.fullmatch(name.removeprefix(HUB_PREFIX))):
        repo_id, split = on_hub.groups()
        called, rows, within = hub_stream(repo_id, split, splits)
        return called, rows, None, within
    near = difflib.get_close_matches(str(name), sets, n=1)
    hint = f", did you mean {near[0]!r}" if near else ""
    raise DataError(f"there are no {wanted} {str(name)!r}{hint}: give {forms}.")


def find_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The only one of the columns of a kind; of several, the first with a usual name."""
    return columns[0] if len(columns) == 1 else next((name for name in usual if name in columns), None)


def is_integer(feature: Any) -> bool:
    """Whether a column holds whole numbers without names of classes."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def is_words(feature: Any) -> bool:
    """Whether a column holds text, or true and false, that may name classes."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "bool")


def undecoded(
    data: Rows, *, image: str, label: str | None, called: str, others: Sequence[str | None] = ()
) -> tuple[Rows, str | None, tuple[str, ...] | None]:
    """Leave out other columns and leave decoding to the reader; labels in words become `numbered` ones.

    Returns:
        The rows, their column of labels, and the names of the classes, where they are known.
    """
    features = features_of(data)
    names = getattr(features[label], "names", None) if label else None
    if label and isinstance(data, datasets.Dataset) and is_words(features[label]):
        data, label, names = numbered(data, label)
    require_names(names, called)
    if data.features:
        data = data.select_columns([column for column in (image, label, *others) if column])
        data = data.cast_column(image, datasets.Image(decode=False))
    return data, label, tuple(names) if names else None


def numbered(data: datasets.Dataset, column: str) -> tuple[datasets.Dataset, str | None, tuple[str, ...] | None]:
    """Add a column of the numbers of classes that another column names, in the order of the names.

    Returns:
        The data, the new column and the names; the data alone if there are too many names for classes.
    """
    found = data.unique(column)
    if len(found) > max(MOST_CLASSES, len(data) // 2):
        return data, None, None
    names = tuple(sorted(str(name) for name in found if name is not None))
    number = {name: i for i, name in enumerate(names)}
    labels = [None if name is None else number[str(name)] for name in data[column]]
    new = f"{column} (number)"
    return data.add_column(new, labels, feature=datasets.ClassLabel(names=list(names))), new, names


def require_names(names: Sequence[str] | None, called: str) -> None:
    """Refuse names of classes that cannot be written or shown.

    Raises:
        DataError: A name is not text, is not UTF-8, or holds control characters.
    """
    for name in names or ():
        if not isinstance(name, str) or UNPRINTABLE.search(name):
            raise DataError(
                f"{called} has a class called {name!a}, which is not UTF-8 or holds control characters: rename it."
            )


def features_of(data: Rows) -> Mapping[str, Any]:
    """Columns and their kinds; of a stream without such a list, those that can be seen in its first row."""
    if data.features:
        return data.features
    row = next(iter(data), {})
    kinds = {Image.Image: datasets.Image(), int: datasets.Value("int64"), str: datasets.Value("string")}
    return {column: kinds[kind] for column, value in row.items() for kind in kinds if isinstance(value, kind)}
