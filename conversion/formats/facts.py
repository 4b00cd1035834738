"""What no tensor tells about a network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitreg_hub.network.position_rule import PositionRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What no tensor tells about a network, in the words of `CheckpointFormat` and `BundleConfig`; None is unknown.

    Attributes:
        img_size: Height and width in pixels.
        preprocess: Fields of `Preprocess`, without the input size.
        assumptions: What was assumed because there is no config, a sentence each.
        shape: What the tensors tell too, for comparison: fields of `Structure`.
    """

    family: str | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    act: str | None = None
    img_size: tuple[int, int] | None = None
    other_rows: int | None = None
    global_pool: str | None = None
    positions: PositionRule | None = None
    residual_scale: float = 1.0
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None
    assumptions: tuple[str, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict)


def height_and_width(size: Any) -> tuple[int, int] | None:
    """Both sides of an image or patch, which configs give as one number or as two."""
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
