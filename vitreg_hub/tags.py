"""Which rows have weights, and under which of timm's tags; does not import timm."""

from collections.abc import Iterator
from pathlib import Path

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
"""Bundles that are part of the package: one folder each, named architecture.tag."""

DINOV2_SIZES = ("small", "base", "large", "giant")
"""The sizes in which timm distributes Meta's DINOv2 weights with four registers."""


def tags(arch: str) -> tuple[str, ...]:
    """The tags of a row's weights, in the order of their names."""
    return tuple(sorted(tag for name, _, tag in (weights.partition(".") for weights in _weights()) if name == arch))


def _weights() -> Iterator[str]:
    for size in DINOV2_SIZES:
        yield f"vit_{size}_reg4.dinov2_lvd142m"
    yield from (folder.name for folder in SHIPPED_WEIGHTS.glob("*.*"))
