"""Data sets that ship with the package's dependencies, as ordinary `datasets.Dataset`s."""

import io
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT_EVERY = 5
"""Every fifth digit is held out, so that each of the writers, who follow one another, is on both sides."""

PICTURES = {
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
    "skimage.data": (
        *("rocket.jpg", "hubble_deep_field.jpg", "astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png"),
        *("camera.png", "coins.png", "moon.png", "ihc.png", "brick.png", "grass.png", "gravel.png"),
    ),
}
"""Files behind `photos`, by the package that holds them. Read as files, for skimage's own functions may download."""

TILE = 128
"""Side of a tile in pixels: the smallest pictures, chelsea and coins, still give six."""


def digits(split: Literal["train", "test"]) -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels, 10 classes, from 43 writers.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part); in scikit-learn as `load_digits`.

    Args:
        split: "test" is every fifth image by index (359), "train" the other 1,438.

    Returns:
        Columns `image` (RGB) and `label`.
    """
    source = load_digits()
    held_out = np.arange(len(source.target)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    pixels = np.round(source.images[chosen] * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p).convert("RGB") for p in pixels], "label": source.target[chosen]},
        features=datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in source.target_names])
        ),
    )


def photos() -> datasets.Dataset:
    """238 tiles of 128 x 128 pixels, cut side by side from 15 pictures, mostly photographs; each picture is a class.

    The pictures are part of scikit-learn (china, flower: CC BY 2.0 by danielbuechele and vultilion) and of
    scikit-image (CC0 or without known restrictions, except for motorcycle_left, Middlebury stereo data set of 2014).

    Source: sklearn/datasets/images/README.txt, and the docstrings of `skimage.data`.

    Returns:
        Columns `image` (RGB) and `label`, picture by picture, tiles row by row.
    """
    pictures = [files(package) / file for package, names in PICTURES.items() for file in names]
    tiles, labels = [], []
    for label, file in enumerate(pictures):
        picture = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
        for top in range(0, picture.height - TILE + 1, TILE):
            for left in range(0, picture.width - TILE + 1, TILE):
                tile = io.BytesIO()
                # BMP: to compress them would take longer than all the rest
                picture.crop((left, top, left + TILE, top + TILE)).save(tile, "BMP")
                tiles.append({"bytes": tile.getvalue(), "path": None})
                labels.append(label)
    names = [file.name.partition(".")[0] for file in pictures]
    return datasets.Dataset.from_dict(
        {"image": tiles, "label": labels},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names)),
    )


EMBEDDED: Mapping[str, Callable[[], datasets.Dataset]] = MappingProxyType(
    {"photos": photos, "digits": partial(digits, "test")}
)
"""Images that need no network, by name."""
