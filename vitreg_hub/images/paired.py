"""Folders of pictures beside folders of their masks or depths, paired by the names of the files."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import files_below, folders_in

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""Names of folders by split."""

PICTURES = ("images", "image", "rgb", "JPEGImages")
"""Names of folders with pictures."""

TARGETS = {
    "mask": ("masks", "mask", "annotations", "labels", "SegmentationClass"),
    "depth": ("depth", "depths", "depth_maps"),
}
"""Names of folders with what is known of them."""


def aliases(split: str) -> tuple[str, ...]:
    """Names that a folder with a split may have."""
    return next((names for names in SPLITS.values() if split in names), (split,))


def paired_rows(root: Path, target: Literal["mask", "depth"], split: str | None) -> list[dict[str, Path]]:
    """Rows of files, ``{"image": ..., "mask": ...}``, in the order of their names.

    Args:
        root: Holds ``images`` and ``masks`` (or other names in `PICTURES` and `TARGETS`), each with a folder for every
            split, or a folder for every split that holds these; or the folders of Pascal VOC.
        target: What belongs to every picture.
        split: Which one, if there are several.

    Raises:
        DataError: A folder is missing, a picture is without the target, or names are ambiguous.
    """
    pictures, targets = _folder(root, PICTURES, split), _folder(root, TARGETS[target], split)
    images = _by_stem(pictures, IMG_EXTENSIONS)
    found = _by_stem(targets, (*IMG_EXTENSIONS, ".npy"))
    names = listed(root, "Segmentation", split) if pictures.name == "JPEGImages" else None
    names = [name for name in images if name in found] if names is None and pictures.name == "JPEGImages" else names
    names = list(images) if names is None else names
    if missing := [name for name in names if name not in images]:
        raise DataError(f"{root} lists {missing[0]}, but there is no such picture in {pictures}: add it.")
    if missing := [name for name in names if name not in found]:
        others = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(
            f"{images[missing[0]]} has no {target}{others}: put a file of the name {missing[0]} into {targets}, or "
            "take the picture away."
        )
    if alone := sorted(found.keys() - images.keys()):
        logger.warning("%s has no picture in %s, nor have %d others", found[alone[0]], pictures, len(alone) - 1)
    if not names:
        raise DataError(f"there are no pictures in {pictures}: their names must end in {', '.join(IMG_EXTENSIONS)}.")
    return [{"image": images[name], target: found[name]} for name in names]


def listed(root: Path, kind: str, split: str | None) -> list[str] | None:
    """Names of Pascal VOC's pictures in ``ImageSets/{kind}/{split}.txt``; None if no split is asked for.

    Raises:
        DataError: There is no such list, or a name is none of a file.
    """
    if split is None:
        return None
    folder = root / "ImageSets" / kind
    there = [file.stem for file in sorted(folder.glob("*.txt"))]
    name = next((name for name in (split, *aliases(split)) if name in there), None)
    if name is None:
        raise DataError(f"{folder} has no list {split}.txt: give one of the splits {', '.join(there) or '(none)'}.")
    try:
        lines = [line.split() for line in (folder / f"{name}.txt").read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{folder / name}.txt is no list of names: {error}.") from error
    names = [words[0] for words in lines if words[-1] != "-1"]  # lists of one class end in 1, 0 or -1
    if odd := next((name for name in names if Path(name).name != name or name == ".."), None):
        raise DataError(f"{folder / split}.txt lists {odd!r}, which is no name of a file in this folder.")
    return names


def _folder(root: Path, names: Iterable[str], split: str | None) -> Path:
    """The folder with one of these names, of this split."""
    names = tuple(names)
    for name in names:
        if (root / name).is_dir() and (split is None or name in ("JPEGImages", "SegmentationClass")):
            known = {alias for each in SPLITS.values() for alias in each}
            inside = [folder.name for folder in folders_in(root / name)]
            if inside and set(inside) <= known:
                raise DataError(f"{root / name} holds the splits {', '.join(inside)}: give one of them as split.")
            return root / name
        for alias in aliases(split) if split else ():
            for folder in (root / name / alias, root / alias / name):
                if folder.is_dir():
                    return folder
    of = f" for the split {split}" if split else ""
    there = ", ".join(folder.name for folder in folders_in(root)) or "no folders"
    raise DataError(
        f"{root} has no folder {' or '.join(names)}{of}, but {there}: name them so, or give another folder."
    )


def _by_stem(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Files below a folder by their names without ending."""
    found: dict[str, Path] = {}
    for file in files_below(folder):
        if file.lower().endswith(endings):
            stem = str(Path(file).relative_to(folder).with_suffix(""))
            if stem in found:
                raise DataError(f"both {found[stem]} and {file} are there: keep the one that is meant.")
            found[stem] = Path(file)
    return found
