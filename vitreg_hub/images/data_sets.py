"""Data sets of images as `datasets` has them: folders, the Hub, and which column is what."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import EMBEDDED

SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
"""Names of sub-folders that are splits, not classes."""

FORMS = (
    f"an embedded data set ({', '.join(EMBEDDED)}), a folder, a data set on the Hub (org/name[:split]), "
    "a datasets.Dataset or IterableDataset, PIL images, or a tensor [N, 3, H, W]"
)
"""What a user may give as images."""

ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
"""``org/name[:split]``."""

Rows = datasets.Dataset | datasets.IterableDataset


def image_folder(root: Path, *, classes: Collection[str] = ()) -> datasets.Dataset:
    """All images below a folder, in the order of their names. Only names are in memory, and no cache is written.

    Folders in it are classes if they hold most of the images and are several, or one of these `classes`; images beside
    them then have no label.
    """
    paths = []
    for parent, below, files in os.walk(root, followlinks=True):
        below[:] = sorted(folder for folder in below if not folder.startswith((".", "__MACOSX")))
        images = (file for file in files if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith("."))
        paths += [os.path.join(parent, file) for file in sorted(images)]
    if not paths:
        raise DataError(f"there are no images below {root}: their names must end in {', '.join(IMG_EXTENSIONS)}.")
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


def hub_stream(repo_id: str, split: str | None, usual_splits: Sequence[str]) -> tuple[str, datasets.IterableDataset]:
    """Name and rows of a split on the Hub; of the first usual one that exists if none is given."""
    try:
        splits = datasets.load_dataset(repo_id, streaming=True)
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
    return f"{repo_id}:{split}", splits[split]


def find_column(columns: Sequence[str], usual: Sequence[str]) -> str | None:
    """The only one of the columns of a kind; of several, the first with a usual name."""
    return columns[0] if len(columns) == 1 else next((name for name in usual if name in columns), None)


def is_integer(feature: Any) -> bool:
    """Whether a column holds whole numbers without names of classes."""
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def features_of(data: Rows) -> Mapping[str, Any]:
    """Columns and their kinds; of a stream without such a list, those that can be seen in its first row."""
    if data.features:
        return data.features
    row = next(iter(data), {})
    kinds = {Image.Image: datasets.Image(), int: datasets.Value("int64"), str: datasets.Value("string")}
    return {column: kinds[kind] for column, value in row.items() for kind in kinds if isinstance(value, kind)}
