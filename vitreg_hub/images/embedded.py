"""Data sets that need no download, as ordinary `datasets.Dataset`s: of the package's dependencies, or drawn."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from vitreg_hub.images.scenes import Split, scenes

HELD_OUT_EVERY = 5
"""Every fifth image is held out: images of one writer, or tiles of one picture, follow one another, so that both sides
get some of each."""

PICTURES = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": (
        *("rocket.jpg", "hubble_deep_field.jpg", "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png"),
        *("camera.png", "coins.png", "moon.png", "ihc.png", "brick.png", "grass.png", "gravel.png"),
    ),
}
"""Files behind `photos`, by the package that holds them. Read as files, since skimage's own functions may download."""

TILE = 128
"""Side of a tile in pixels; the smallest pictures, chelsea and coins, still give six."""


def digits(split: Split) -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels, 10 classes, from 43 writers.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part); in scikit-learn as `load_digits`.

    Args:
        split: "test" is every fifth image by index (359), "train" the other 1,438.

    Returns:
        Columns `image` (RGB) and `label`.
    """
    stored: Bunch = load_digits()  # pyright: ignore[reportAssignmentType]  # a tuple on request only
    chosen = _indices(len(stored.target), split)
    pixels = np.round(stored.images[chosen] * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    names = [str(name) for name in stored.target_names]
    return _labelled([Image.fromarray(p).convert("RGB") for p in pixels], stored.target[chosen], names)


def _labelled(images: Sequence[Any], labels: Sequence[int], names: list[str]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _indices(number: int, split: Split | None) -> np.ndarray:
    """Indices of the images of a split."""
    every = np.arange(number)
    if split is None:
        return every
    held_out = every % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return every[held_out if split == "test" else ~held_out]


def photos(split: Split | None = None, *, whole: bool = False) -> datasets.Dataset:
    """238 tiles of 128 x 128 pixels, cut side by side from 15 pictures, mostly photographs; each picture is a class.

    The pictures are part of scikit-learn (china, flower: CC BY 2.0 by danielbuechele and vultilion) and of
    scikit-image (CC0 or without known restrictions, except for motorcycle_left, Middlebury stereo data set of 2014).

    Source: sklearn/datasets/images/README.txt, and the docstrings of `skimage.data`.

    Args:
        split: None is all tiles, "test" every fifth (47), "train" the other 191. Both show the same pictures.
        whole: Do not cut the pictures: large networks would see their tiles enlarged, with a lattice of its own.

    Returns:
        Columns `image` (RGB) and `label`, picture by picture, tiles row by row.
    """
    pictures = [files(package) / file for package, names in PICTURES.items() for file in names]
    tiles, labels = [], []
    for label, file in enumerate(pictures):
        picture = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        height, width = (picture.height, picture.width) if whole else (TILE, TILE)
        for top in range(0, picture.height - height + 1, height):
            for left in range(0, picture.width - width + 1, width):
                tile = io.BytesIO()
                # BMP, since compression would take longer than all the rest
                picture.crop((left, top, left + width, top + height)).save(tile, "BMP")
                tiles.append({"bytes": tile.getvalue(), "path": None})
                labels.append(label)
    chosen = _indices(len(tiles), split)
    names = [file.name.partition(".")[0] for file in pictures]
    return _labelled([tiles[i] for i in chosen], [labels[i] for i in chosen], names)


EMBEDDED: Mapping[str, Callable[[], datasets.Dataset]] = MappingProxyType(
    {"photos": photos, "digits": partial(digits, "test"), "scenes": partial(scenes, "test")}
)
"""Images to look at that need no network, by name."""

TRAINING_SETS: Mapping[str, Callable[[Split], datasets.Dataset]] = MappingProxyType(
    {"digits": digits, "photos": photos, "scenes": scenes}
)
"""The same to train on and to hold out, by name."""
