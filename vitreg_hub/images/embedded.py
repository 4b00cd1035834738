"""Data sets that need no download, as ordinary `datasets.Dataset`s: of the package's dependencies, or drawn."""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

import datasets
import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

Split = Literal["train", "test"]

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

SCENE = 64
"""Side of a scene in pixels."""

PER_CLASS = {"train": 84, "test": 10}
"""Scenes of each class."""

COLORS = {
    "red": (220, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 225, 40),
    "green": (35, 165, 55),
    "cyan": (40, 205, 215),
    "blue": (40, 70, 220),
    "purple": (130, 40, 175),
    "pink": (250, 125, 185),
}
"""RGB of the colours in scenes."""


PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
"""Where the object of a scene is, for captions."""


def _around(corners: int, *radii: float) -> np.ndarray:
    """Corners at equal angles, as complex numbers; the radii take turns."""
    return np.exp(2j * np.pi * np.arange(corners) / corners) * np.resize(radii, corners)


SHAPES = {
    "circle": _around(48, 1),
    "square": _around(4, 1),
    "triangle": _around(3, 1),
    "star": _around(10, 1, 0.4),
    "cross": np.concatenate([turn * np.array([1 - 0.3j, 1 + 0.3j, 0.3 + 0.3j]) for turn in (1, 1j, -1, -1j)]),
    "ring": np.concatenate([_around(48, 1), [1], [0.55], _around(48, 0.55)[::-1]]),
}
"""Outlines of the shapes in scenes: corners as complex numbers, at most 1 (cross: 1.04) from the middle."""

CAPTIONS = (
    "{a} {thing} {place}",
    "{place}, {a} {thing}",
    "there is {a} {thing} {place}",
    "{a} {thing} among small grey shapes",
    "a picture of {a} {thing}",
    "a drawing with {a} {thing} {place}",
    "{a} {thing}",
)
"""Sentences about a scene."""


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


def _labelled(
    images: Sequence[Any], labels: Sequence[int], names: list[str], **texts: Sequence[str]
) -> datasets.Dataset:
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    features = datasets.Features(**kinds, **dict.fromkeys(texts, datasets.Value("string")))
    return datasets.Dataset.from_dict({"image": images, "label": labels, **texts}, features=features)


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


def scenes(split: Split) -> datasets.Dataset:
    """Drawn scenes of 64 x 64 pixels with captions: an object of 8 colours and 6 shapes before small grey shapes.

    Place, size, rotation and background are random, the same in every call.

    Args:
        split: "train" is 84 scenes of each of the 48 classes (4,032), "test" 10 others of each (480).

    Returns:
        Columns `image` (RGB), `label` (such as "red circle"; the classes take turns) and `text`, a caption that holds
        the name of the class, and often size and place.
    """
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    rng = np.random.default_rng(list(PER_CLASS).index(split))
    labels = list(range(len(names))) * PER_CLASS[split]
    pictures, texts = zip(*(_scene(rng, *names[label].split()) for label in labels), strict=True)
    return _labelled(pictures, labels, names, text=texts)


def _scene(rng: np.random.Generator, color: str, shape: str) -> tuple[dict[str, bytes | None], str]:
    """A picture, as a file, and its caption."""
    fine = 2  # drawn larger, for smooth edges
    tints = rng.integers(70, 190, (*rng.integers(2, 7, 2), 1)) + rng.integers(-15, 16, 3)
    canvas = Image.fromarray(tints.astype(np.uint8)).resize((SCENE * fine, SCENE * fine), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(canvas)

    def paint(outline: np.ndarray, center: complex, radius: float, rgb: np.ndarray) -> None:
        corners = fine * (center + radius * np.exp(2j * np.pi * rng.random()) * outline)
        draw.polygon(corners.view(float).tolist(), fill=tuple(rgb.tolist()))

    outlines = list(SHAPES.values())
    for _ in range(rng.integers(2, 5)):
        x, y = rng.uniform(0, SCENE, 2)
        paint(outlines[rng.integers(len(outlines))], x + 1j * y, rng.uniform(3, 5), np.repeat(rng.integers(40, 220), 3))
    radius = rng.uniform(8, 20)
    x, y = rng.uniform(radius, SCENE - radius, 2)
    paint(SHAPES[shape], x + 1j * y, radius, np.clip(COLORS[color] + rng.integers(-12, 13, 3), 0, 255))

    file = io.BytesIO()
    canvas.reduce(fine).save(file, "BMP")
    return {"bytes": file.getvalue(), "path": None}, _caption(rng, f"{color} {shape}", radius, x, y)


def _caption(rng: np.random.Generator, name: str, radius: float, x: float, y: float) -> str:
    place = PLACES[int(3 * y / SCENE)][int(3 * x / SCENE)]
    size = "small " if radius < 12 else "large " if radius > 16 else ""
    thing = size + name if rng.random() < 0.5 else name
    sentence = CAPTIONS[rng.integers(len(CAPTIONS))]
    return sentence.format(a="an" if thing[0] in "aeiou" else "a", thing=thing, place=place)


EMBEDDED: Mapping[str, Callable[[], datasets.Dataset]] = MappingProxyType(
    {"photos": photos, "digits": partial(digits, "test"), "scenes": partial(scenes, "test")}
)
"""Images to look at that need no network, by name."""

TRAINING_SETS: Mapping[str, Callable[[Split], datasets.Dataset]] = MappingProxyType(
    {"digits": digits, "photos": photos, "scenes": scenes}
)
"""The same to train on and to hold out, by name."""
