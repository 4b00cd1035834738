"""What no tensor tells about a network."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vitreg_hub.network.position_rule import PositionRule

MAX_KEY = 80
"""Characters of a config's key that a note shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What no tensor tells about a network, in the words of `CheckpointFormat` and `BundleConfig`; None is unknown.

    Attributes:
        img_size: Height and width in pixels.
        preprocess: Fields of `Preprocess`, without the input size.
        assumptions: What was assumed because there is no config, a sentence each.
        unread: Keys of the configs that tell something which is not kept, or which nothing here knows.
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
    unread: tuple[str, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict)


def unknown_keys(config: Mapping[str, Any], known: Collection[str], *, inside: str = "") -> tuple[str, ...]:
    """The keys of a config that are not known."""
    names = (f"{inside}{key}" for key in config if key not in known)
    return tuple(name if name.isprintable() and len(name) <= MAX_KEY else f"{name[:MAX_KEY]!a} ..." for name in names)


def names_in_order(labels: Any) -> tuple[str, ...] | None:
    """Names of classes, which configs give as a list or by number; None where the numbers are not those of classes.

    Raises:
        ValueError: A key is no number.
    """
    if isinstance(labels, Mapping):
        by_number = {int(key): str(name) for key, name in labels.items()}
        return tuple(by_number[k] for k in sorted(by_number)) if set(by_number) == set(range(len(labels))) else None
    return tuple(map(str, labels)) if isinstance(labels, list | tuple) else None


def height_and_width(size: Any) -> tuple[int, int] | None:
    """Both sides of an image or patch, which configs give as one number or as two."""
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)
