"""Random views of pictures and their maps for training; every draw comes from a generator that is given."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from vitreg_hub.evaluation.dense.heads import as_tensor

MOST_OF_ONE_CLASS = 0.75
"""Share of a crop's pixels that one class may have; where it has more, another crop is tried."""
TRIES = 10
ANGLE = 2.5
"""Degrees by which pictures are turned at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A picture and its map, as they are changed together.

    Attributes:
        image: RGB.
        values: [H, W] the classes or depths of its pixels.
        unknown: Value of pixels of which nothing is known.
    """

    image: Image.Image
    values: np.ndarray
    unknown: float

    def resized(self, height: int, width: int) -> "View":
        """Resize the picture bilinearly and take the nearest values."""
        values = Image.fromarray(_storable(self.values)).resize((width, height), Image.Resampling.NEAREST)
        return View(
            image=self.image.resize((width, height), Image.Resampling.BILINEAR),
            values=np.asarray(values).astype(self.values.dtype),
            unknown=self.unknown,
        )

    def short_side(self, side: int) -> "View":
        """Resize so that the shorter side has this many pixels."""
        return self.resized(*sides(self.image.height, self.image.width, short=side))

    def cut(self, top: int, left: int, height: int, width: int) -> "View":
        """Cut out a part; where it ends beyond the picture, it is smaller."""
        height, width = min(height, self.image.height - top), min(width, self.image.width - left)
        return View(
            image=self.image.crop((left, top, left + width, top + height)),
            values=self.values[top : top + height, left : left + width],
            unknown=self.unknown,
        )

    def mirrored(self) -> "View":
        """Mirror from left to right."""
        return View(image=ImageOps.mirror(self.image), values=self.values[:, ::-1], unknown=self.unknown)

    def turned(self, degrees: float) -> "View":
        """Turn around the centre; corners that come from outside are black and unknown."""
        values = Image.fromarray(_storable(self.values)).rotate(
            degrees, Image.Resampling.NEAREST, fillcolor=self.unknown
        )
        return View(
            image=self.image.rotate(degrees, Image.Resampling.BILINEAR),
            values=np.asarray(values).astype(self.values.dtype),
            unknown=self.unknown,
        )

    def tensors(self, height: int, width: int, *, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The normalised picture [3, height, width] and its values [height, width], padded at the right and bottom."""
        image, values = as_tensor(self.image, mean=mean, std=std), torch.from_numpy(self.values.copy())
        padding = (0, width - image.shape[2], 0, height - image.shape[1])
        return (
            torch.nn.functional.pad(image, padding),
            torch.nn.functional.pad(values, padding, value=self.unknown),
        )


def sides(height: int, width: int, *, short: int) -> tuple[int, int]:
    """Height and width after resizing so that the shorter side has `short` pixels (dinov3's FixedSideResize)."""
    if height > width:
        return int(short * height / width + 0.5), short
    return short, int(short * width / height + 0.5)


def segmentation_view(view: View, rng: np.random.Generator, *, crop: int) -> View:
    """Resize to 0.5 to 2 times the crop, cut, mirror, change colours.

    Source: DINOv2's and DINOv3's linear segmentation, whose pipeline is mmsegmentation's. A crop of which more than
    three quarters are of one class is drawn again, up to ten times.
    """
    view = view.short_side(max(1, int(crop * rng.uniform(0.5, 2))))
    part = _random_part(view, rng, crop, crop)
    for _ in range(TRIES):
        counts = np.unique(part.values[part.values != view.unknown], return_counts=True)[1]
        if len(counts) > 1 and counts.max() < MOST_OF_ONE_CLASS * counts.sum():
            break
        part = _random_part(view, rng, crop, crop)
    if rng.random() < 0.5:
        part = part.mirrored()
    return View(image=_distorted(part.image, rng), values=part.values, unknown=part.unknown)


def depth_view(view: View, rng: np.random.Generator, *, crop: tuple[int, int]) -> View:
    """Turn by up to 2.5 degrees, mirror, cut, change brightness.

    Source: DINOv2's and DINOv3's linear depth on NYUv2.
    """
    if rng.random() < 0.5:
        view = view.turned(rng.uniform(-ANGLE, ANGLE))
    if rng.random() < 0.5:
        view = view.mirrored()
    view = _random_part(view, rng, *crop)
    return View(image=_brightened(view.image, rng), values=view.values, unknown=view.unknown)


def without_border(view: View) -> View:
    """What NYUv2's pictures show inside of their white border: rows 45 to 472 and columns 43 to 608 of 480 x 640."""
    height, width = view.values.shape
    top, bottom = (int(row / 480 * height) for row in (45, 472))
    left, right = (int(column / 640 * width) for column in (43, 608))
    return view.cut(top, left, bottom - top, right - left)


def _random_part(view: View, rng: np.random.Generator, height: int, width: int) -> View:
    top = int(rng.integers(max(view.image.height - height, 0) + 1))
    left = int(rng.integers(max(view.image.width - width, 0) + 1))
    return view.cut(top, left, height, width)


def _storable(values: np.ndarray) -> np.ndarray:
    """Values as Pillow holds them: it has no kind for int64."""
    return np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else np.int32)


def _distorted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """mmsegmentation's photometric distortion with DINOv3's ranges: each change is made half of the time."""
    brightness, contrast, saturation, hue = (
        rng.uniform(-32, 32),
        rng.uniform(0.5, 1.5),
        rng.uniform(0.5, 1.5),
        rng.uniform(-0.5, 0.5),
    )
    chosen, contrast_first = rng.random(4) < 0.5, rng.random() < 0.5
    if chosen[0]:
        image = _with_pixels(image, 1, brightness)
    if chosen[1] and contrast_first:
        image = _with_pixels(image, contrast, 0)
    if chosen[2]:
        image = ImageEnhance.Color(image).enhance(saturation)
    if chosen[3]:
        turned = np.asarray(image.convert("HSV")).copy()
        turned[..., 0] += np.uint8(int(hue * 255) % 256)
        image = Image.fromarray(turned, mode="HSV").convert("RGB")
    if chosen[1] and not contrast_first:
        image = _with_pixels(image, contrast, 0)
    return image


def _brightened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half of the time: gamma (of 0 to 255, as officially), and other brightness of all channels and of each."""
    gamma, brightness, colors = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25), rng.uniform(0.9, 1.1, size=3)
    if rng.random() < 0.5:
        return image
    pixels = np.asarray(image, dtype=np.float32) ** gamma * brightness * colors
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _with_pixels(image: Image.Image, factor: float, shift: float) -> Image.Image:
    return Image.fromarray((np.asarray(image, dtype=np.float32) * factor + shift).clip(0, 255).astype(np.uint8))
