"""One picture: which files are opened, how it becomes RGB, and how what a network takes becomes a picture again."""

import io
import os
import re
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.download.streaming_download_manager import xopen
from PIL import Image, ImageOps
from torch import Tensor

from vitreg_hub.errors import DataError

# What Pillow raises for a file that is broken or not an image.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError)
BROKEN += (struct.error, ArithmeticError, LookupError, TypeError, RuntimeError)

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
"""Kinds of pictures that are opened, whatever a file's ending says: for others, such as EPS, Pillow starts programs."""

SMALL = 2**24
"""Pixels that any file may have."""
PIXELS_PER_BYTE = 100
"""Most pixels for a byte of the file beyond that: photographs have up to 20, decompression bombs hundreds."""

ZIPPED = re.compile(r"zip://[^:]*::")
"""How `datasets` names what is inside an archive, before the archive."""


def read_rgb(value: Any, *, within: str | None = None) -> Image.Image:
    """The picture of a row that `datasets` did not decode, of a file, or an opened one.

    Args:
        value: A row's ``{"bytes", "path"}``, a path, or a picture.
        within: Folder, or start of the URLs, below which a row may name files; None: wherever it likes.

    Raises:
        DataError: The row names a file elsewhere.
        BROKEN: It cannot be read, or is no picture.
    """
    return to_rgb(open_picture(value, within=within) if isinstance(value, str | Path | dict) else value)


def open_picture(value: str | Path | dict[str, Any], *, within: str | None = None) -> Image.Image:
    """The picture of a row or file as it is stored, with its pixels read; all else as `read_rgb` does."""
    file, size = _named(value, within) if isinstance(value, dict) else (value, _size_of(value))
    with Image.open(file, formats=FORMATS) as picture:
        if picture.width * picture.height > max(SMALL, PIXELS_PER_BYTE * size):
            raise ValueError(
                f"{picture.width} x {picture.height} pixels from only {size:,} bytes are a decompression bomb, or a "
                "drawing that should be saved smaller"
            )
        picture.load()
        return picture


def _named(row: dict[str, Any], within: str | None) -> tuple[str | io.BytesIO, int]:
    """The content or the file of a row, and its size."""
    content, path = row.get("bytes"), row.get("path")
    if content is None and path is None:
        raise ValueError("the row holds no picture")
    if content is None:
        path = _allowed(str(path), within)
        if "://" not in path:
            return path, _size_of(path)
        with xopen(path, "rb") as remote:
            content = remote.read()
    return io.BytesIO(content), len(content)


def _size_of(file: str | Path) -> int:
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not an ordinary file")
    return about.st_size


def _allowed(path: str, within: str | None) -> str:
    """The path of a picture that a row names, as it can be opened."""
    if within is None:
        return path
    if "://" in within:
        inside = ZIPPED.sub("", path, count=1)
        if inside.startswith(within) and "::" not in inside and ".." not in inside.split("/"):
            return path
    elif "://" not in path:
        root = Path(within).resolve()
        inside = [file for file in (root / path, Path(path)) if file.resolve().is_relative_to(root)]
        if inside:
            return str(next(filter(Path.exists, inside), inside[0]))
    raise DataError(
        f"the data name the picture {path!r}, which is not below {within}: rows may be made to fetch private files, so "
        "copy the pictures there, or train with data.allow_remote if you trust their author."
    )


def file_of(value: Any) -> str | None:
    """The file of a picture as `read_rgb` takes it, if it has one."""
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image: turned upright by its EXIF data, white where it is transparent, 16 bits cut to the upper 8.

    Raises:
        ValueError: It is not an image, or its pixels have no known range.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"it is {type(image).__name__}, not a picture")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode} have no known range, so save it with 8 bits")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gray:
    """A transform for a network of one channel: the picture in grey, the mean of its three normalised channels.

    Attributes:
        transform: Makes a tensor [3, H, W] of an RGB image.
    """

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        """Make a tensor [1, H, W] of an RGB image."""
        return self.transform(image.convert("L").convert("RGB")).mean(dim=0, keepdim=True)


def displayable(image: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
    """What a network takes, [C, height, width], as the picture that it was: [height, width, 3] in [0, 1].

    Where there are not three channels, it is grey. Where the normalisation is unknown, the darkest value becomes 0 and
    the brightest 1.
    """
    image = image.detach().float().cpu()
    if mean and std and len(mean) == len(std) and len(image) in (1, len(mean)):
        slope = 1 / torch.tensor(std, dtype=torch.float32)
        shift = torch.tensor(mean, dtype=torch.float32) * slope
        if len(image) == 1:  # as `Gray` makes it
            slope, shift = slope.mean(0, keepdim=True), shift.mean(0, keepdim=True)
        image = (image + shift[:, None, None]) / slope[:, None, None]
    else:
        low, high = torch.aminmax(image)
        image = (image - low) / (high - low).clamp_min(1e-12)
    if len(image) != 3:
        image = image.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return image.clamp(0, 1).permute(1, 2, 0).numpy()
