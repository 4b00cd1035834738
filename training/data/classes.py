"""Which classes data really have: what is lost of them on the way from files to labels, and a part held out of each."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import pyarrow
from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import files_below, folders_in
from vitreg_hub.images.pictures import BROKEN, read_rgb
from vitreg_hub.training.data.opening import TrainingData, as_stream, held_out_rows, open_rows
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.recipes.settings import DataSettings
from vitreg_hub.training.tasks.settings import Need

MOST_CHECKED = 1000
"""Classes of which an image is opened at the start, which takes some milliseconds each."""
MOST_NAMED = 3
HELD_OUT_STREAM = 1
"""Separates the choice of what is held out from all other random numbers of the same seed."""


def open_data(
    settings: DataSettings, *, needs: Collection[Need], seed: int
) -> tuple[TrainingData, TrainingData | None, tuple[str, ...]]:
    """Open what is trained on and what is held out, and find out what of their classes cannot be used.

    Args:
        seed: Chooses the images of `settings.held_out`.

    Returns:
        The training data, the held-out data if any, and what a user should know of them, in sentences.

    Raises:
        DataError: There are no such data, or no image of a class can be read that is to be learnt.
    """
    data = open_rows(settings.train, "train", settings)
    notes = list(lost_classes(data))
    if notes and "labels" in needs:
        raise DataError(f"{notes[0]}: save them as PNG or JPEG, or remove the class.")
    notes += strays(data)
    if "labels" in needs:
        data = with_classes_only(data)
    held_out = held_out_rows(settings, data)
    if held_out is None and settings.held_out:
        data, held_out = hold_out(data, settings.held_out, seed=seed)
    elif held_out is not None:
        notes += [*lost_classes(held_out), *strays(held_out), *missing_classes(held_out)]
    return as_stream(data, settings), held_out, tuple(f"{note}." for note in notes)


def with_classes_only(data: TrainingData) -> TrainingData:
    """The same without images that have no class, where others of a folder have one."""
    if data.folder is None or not data.has_labels:
        return data
    return _part(data, np.flatnonzero(_labels(data) >= 0))


def strays(data: TrainingData) -> Iterator[str]:
    """Yield a sentence about what a folder has beside its class folders, if there is anything."""
    if data.folder is None or not data.has_labels:
        return
    if len(places := np.flatnonzero(_labels(data) < 0)):
        first = _some(_called(data, places), len(places))
        yield f"{data.name} has images beside its class folders, which have no class and do not count: {first}"


def lost_classes(data: TrainingData) -> Iterator[str]:
    """Yield a sentence for every class that has files but no image that can be read."""
    for folder in _class_folders(data):
        files = list(files_below(folder))
        if not any(file.lower().endswith(IMG_EXTENSIONS) for file in files):
            told = _some(files[:MOST_NAMED], len(files)) or "its folder is empty"
            yield f"no image of {folder.name} in {data.name} can be read ({told})"
    if data.is_stream or not data.has_labels:
        return
    labels = _labels(data)
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    for number, places in list(zip(classes, np.split(order, starts[1:]), strict=True))[:MOST_CHECKED]:
        if number < 0 or any(_can_be_read(data, int(place)) for place in places):
            continue
        name = data.label_names[number] if data.label_names else number
        yield f"no image of {name} in {data.name} can be read ({_some(_called(data, places), len(places))})"


def missing_classes(data: TrainingData) -> Iterator[str]:
    """Yield a sentence about the classes that have no image in held-out data, if there are any."""
    if data.is_stream or not (data.has_labels and data.label_names):
        return
    there = set(_labels(data).tolist())
    missing = [name for number, name in enumerate(data.label_names) if number not in there]
    if missing:
        names = _some(missing[:MOST_NAMED], len(missing))
        yield f"{data.name} has no images of {names}: scores are of the other {len(there - {-1})} classes alone"


def hold_out(data: TrainingData, share: float, *, seed: int) -> tuple[TrainingData, TrainingData]:
    """Divide data into what is trained on and a share of each class that is not, at least one image of two or more.

    Raises:
        DataError: The data are a stream, or too few.
    """
    if data.is_stream:
        raise DataError(
            f"{data.name} is a stream, of which data.held_out cannot choose images: give data.test instead."
        )
    labels = _labels(data) if data.has_labels else np.zeros(data.num_images or 0, dtype=int)
    random = np.random.default_rng(seed_of(seed, HELD_OUT_STREAM))
    chosen = []
    for number in np.unique(labels):
        places = random.permutation(np.flatnonzero(labels == number))
        chosen += places[: max(round(share * len(places)), int(len(places) > 1))].tolist()
    kept = np.setdiff1d(np.arange(len(labels)), chosen)
    if not chosen or not len(kept):
        raise DataError(f"{data.name} has {len(labels)} images, of which data.held_out {share} leaves none: give more.")
    return _part(data, kept), replace(_part(data, np.sort(chosen)), name=f"{data.name} (held out)")


def _local(data: TrainingData) -> datasets.Dataset:
    return cast(datasets.Dataset, data.rows)


def _labels(data: TrainingData) -> np.ndarray:
    """The class of each row, -1 where it has none."""
    name = cast(str, data.label_column)
    table = cast(pyarrow.Table, _local(data).select_columns([name]).with_format("arrow")[:])
    return table.column(name).fill_null(-1).to_numpy()


def _part(data: TrainingData, places: np.ndarray) -> TrainingData:
    return replace(data, rows=_local(data).select(places), num_images=len(places))


def _called(data: TrainingData, places: np.ndarray) -> list[str]:
    """Names of the first of some images."""
    return [data.called(_local(data)[int(place)], int(place)) for place in places[:MOST_NAMED]]


def _can_be_read(data: TrainingData, place: int) -> bool:
    try:
        read_rgb(_local(data)[place][data.image_column], within=data.within)
    except BROKEN:
        return False
    return True


def _class_folders(data: TrainingData) -> list[Path]:
    """The folders in a folder of images, if there are several."""
    if data.folder is None:
        return []
    below = folders_in(data.folder)
    return below if len(below) > 1 else []


def _some(first: Sequence[str], number: int) -> str:
    return ", ".join(first) + (f" and {number - len(first)} more" if number > len(first) else "")
