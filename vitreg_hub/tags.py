"""Which rows have weights, and under which of timm's tags; does not import timm."""

from pathlib import Path

SHIPPED_WEIGHTS = Path(__file__).parent / "weights"
"""Bundles that are part of the package: one folder each, named architecture.tag."""

DINOV2_SIZES = ("small", "base", "large", "giant")
"""The sizes in which timm distributes Meta's DINOv2 weights with four registers."""


DINOV2 = {f"vit_{size}_reg4.dinov2_lvd142m": f"vit_{size}_patch14_reg4_dinov2.lvd142m" for size in DINOV2_SIZES}
"""Our names of those weights, and timm's."""


def tags(arch: str) -> tuple[str, ...]:
    """The tags of a row's weights, in the order of their names."""
    weights = [*DINOV2, *(folder.name for folder in SHIPPED_WEIGHTS.glob("*.*"))]
    return tuple(sorted(tag for name, _, tag in (name.partition(".") for name in weights) if name == arch))
