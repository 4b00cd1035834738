"""Files of heads: weights as safetensors, and in their header what the head reads and which models it fits."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.files import LARGE_HEADER, has_large_header, whole_file
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.typed import parsed, read

T = TypeVar("T")

HEADER = "vitreg_head"
"""Key of the settings in the file's header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fits:
    """What a model must have for a head to fit it.

    Attributes:
        width: Channels of its tokens.
        blocks: How many it has.
        patch: Height and width of a patch in pixels.
    """

    width: int
    blocks: int
    patch: tuple[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """What a model has."""
        layout = VitLayout.of(model)
        down, right = layout.embedding.stride
        return cls(width=layout.embedding.out_channels, blocks=len(layout.blocks), patch=(int(down), int(right)))

    def __str__(self) -> str:
        return f"{self.blocks} blocks, {self.width} channels and patches of {self.patch[0]} x {self.patch[1]} pixels"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    fits: Fits
    settings: dict[str, Any]


def write_head(path: Path, tensors: Mapping[str, Tensor], *, settings: Mapping[str, Any], fits: Fits) -> None:
    """Write a head to a new file, which appears complete or not at all.

    Raises:
        BundleError: It exists or cannot be written.
    """
    header = json.dumps({"fits": asdict(fits), "settings": settings})
    with whole_file(path) as staging:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staging,
            metadata={"format": "pt", HEADER: header},
        )


def read_head(path: Path, settings_type: type[T], *, kind: str, fits: Fits) -> tuple[T, dict[str, Tensor]]:
    """Read a head's settings and weights.

    Args:
        path: The file.
        settings_type: Of the settings.
        kind: Name of the head's class.
        fits: What the model has that it is wanted for.

    Raises:
        BundleError: The file cannot be read, or holds another kind of head or none.
        DataError: The head does not fit the model.
    """
    if not path.is_file():
        raise BundleError(f"{path} is not a file: give the .safetensors file of a head.")
    if has_large_header(path):
        raise BundleError(f"{path} {LARGE_HEADER}.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read ({error}): give the .safetensors file of a head.") from error
    if text is None:
        raise BundleError(f"{path} holds no head that vitreg_hub saved: give the file that a head's save() wrote.")
    try:
        header = read(_Header, parsed(text, error=BundleError), error=BundleError)
        found = header.settings.pop("kind", None)
        if found != kind:
            raise BundleError(f"it holds a {found}, so load it with {found}.load(), not {kind}.load()")
        settings = read(settings_type, header.settings, called="settings", error=BundleError)
    except BundleError as error:
        raise BundleError(f"{path}: {error}.") from error
    if header.fits != fits:
        raise DataError(
            f"{path} is for a model with {header.fits}, but this one has {fits}: give the model it was for."
        )
    return settings, tensors
