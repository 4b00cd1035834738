"""Drawn scenes about which everything is known: class, caption, box, masks and depth."""

import io
from functools import cache
from importlib.resources import files
from typing import Literal

import datasets
import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "test"]

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

TEXTURES = ("brick.png", "grass.png", "gravel.png", "moon.png")
"""Files of scikit-image (CC0 or without known restrictions) behind half of the scenes."""

UNITS = 1000
"""Of the depths in a metre."""

FLOOR = (10.0, 6.0)
"""Depth of the background in metres, at the top and at the bottom."""

OBJECT, CLUTTER = 24.0, 15.0
"""Depth in metres times radius in pixels: things of one real size, so that the larger are nearer. Every object is in
front of all clutter, and that in front of the background."""

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

MASK_CLASSES = ("background", *SHAPES)
"""Classes of the mask: the object's shape, whatever its colour; small grey shapes are background."""

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


def scenes(split: Split) -> datasets.Dataset:
    """Drawn scenes of 64 x 64 pixels: an object of 8 colours and 6 shapes before small grey shapes.

    The background is a real texture in half of the scenes, and of one colour in the others. Place, size, rotation and
    background are random, the same in every call.

    Args:
        split: "train" is 84 scenes of each of the 48 classes (4,032), "test" 10 others of each (480).

    Returns:
        Columns `image` (RGB), `label` (such as "red circle"; the classes take turns) and `text`, a caption that holds
        the name of the class, and often size and place; `boxes`, left, top, right and bottom edge of the object in
        pixels; `mask`, the number in `MASK_CLASSES` of each pixel; `instances`, 0 for the background, 1 for the object
        and more for each grey shape; `depth`, in millimetres: the object and each grey shape are flat, and the
        background comes nearer towards the bottom.
    """
    names = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    rng = np.random.default_rng(list(PER_CLASS).index(split))
    labels = list(range(len(names))) * PER_CLASS[split]
    rows = [{**_scene(rng, *names[label].split()), "label": label} for label in labels]
    return datasets.Dataset.from_dict(
        {column: [row[column] for row in rows] for column in rows[0]},
        features=datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=names),
            text=datasets.Value("string"),
            boxes=datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            mask=datasets.Image(),
            instances=datasets.Image(),
            depth=datasets.Image(),
        ),
    )


@cache
def _textures() -> tuple[Image.Image, ...]:
    """Grey pictures. Read as files, since skimage's own functions may download."""
    contents = [(files("skimage.data") / file).read_bytes() for file in TEXTURES]
    return tuple(Image.open(io.BytesIO(content)).convert("L") for content in contents)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """A square in muted colours: a part of a texture, or uniform."""
    tint = rng.integers(-15, 16, 3)
    if rng.random() < 0.5:
        return Image.new("RGB", (side, side), tuple((rng.integers(60, 200) + tint).tolist()))
    texture = _textures()[rng.integers(len(TEXTURES))]
    left, top = (int(rng.integers(0, size - side + 1)) for size in texture.size)
    grey = texture.crop((left, top, left + side, top + side))
    tinted = np.clip(np.arange(256) + tint[:, None], 0, 255)
    return Image.merge("RGB", (grey, grey, grey)).point(tinted.ravel().tolist())


def _scene(rng: np.random.Generator, color: str, shape: str) -> dict:
    """A row of `scenes` without its label."""
    fine = 2  # drawn larger, for smooth edges
    canvas = _background(rng, SCENE * fine)
    instances = Image.new("L", canvas.size)
    draws, depths = (ImageDraw.Draw(canvas), ImageDraw.Draw(instances)), [0.0]

    def paint(outline: np.ndarray, center: complex, radius: float, rgb: np.ndarray, number: int) -> None:
        corners = (fine * (center + radius * np.exp(2j * np.pi * rng.random()) * outline)).view(float).tolist()
        draws[0].polygon(corners, fill=tuple(rgb.tolist()))
        draws[1].polygon(corners, fill=number)

    outlines = list(SHAPES.values())
    grey = rng.integers(2, 5)
    for number in range(2, 2 + grey):
        x, y = rng.uniform(0, SCENE, 2)
        radius = rng.uniform(3, 5)
        rgb = np.repeat(rng.integers(40, 220), 3)
        paint(outlines[rng.integers(len(outlines))], x + 1j * y, radius, rgb, number)
        depths.append(CLUTTER / radius)
    radius = rng.uniform(8, 20)
    x, y = rng.uniform(radius, SCENE - radius, 2)
    paint(SHAPES[shape], x + 1j * y, radius, np.clip(COLORS[color] + rng.integers(-12, 13, 3), 0, 255), 1)
    depths.insert(1, OBJECT / radius)

    found = np.asarray(instances)[::fine, ::fine]
    depth = np.round(UNITS * np.array(depths)).astype(np.uint16)[found]
    np.copyto(depth, np.linspace(*FLOOR, SCENE)[:, None] * UNITS, where=found == 0, casting="unsafe")
    rows, columns = (found == 1).any(axis=1).nonzero()[0], (found == 1).any(axis=0).nonzero()[0]
    return {
        "image": _file(canvas.reduce(fine), "BMP"),
        "text": _caption(rng, f"{color} {shape}", radius, x, y),
        "boxes": [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]],
        "mask": _file(Image.fromarray((found == 1).astype(np.uint8) * MASK_CLASSES.index(shape)), "PPM"),
        "instances": _file(Image.fromarray(found), "PPM"),
        "depth": _file(Image.fromarray(depth), "PPM"),
    }


def _file(picture: Image.Image, form: str) -> dict[str, bytes | None]:
    """A picture as a file without compression, which would take longer than all the rest."""
    file = io.BytesIO()
    picture.save(file, form)
    return {"bytes": file.getvalue(), "path": None}


def _caption(rng: np.random.Generator, name: str, radius: float, x: float, y: float) -> str:
    place = PLACES[int(3 * y / SCENE)][int(3 * x / SCENE)]
    size = ""
    if radius < 12:
        size = "small "
    elif radius > 16:
        size = "large "
    thing = size + name if rng.random() < 0.5 else name
    sentence = CAPTIONS[rng.integers(len(CAPTIONS))]
    return sentence.format(a="an" if thing[0] in "aeiou" else "a", thing=thing, place=place)
