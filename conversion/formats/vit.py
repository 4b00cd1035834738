"""The names that timm, DeiT, DINO and DINOv2 share, and the formats that are little more: DeiT and DeiT-III."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from vitreg_hub.conversion.formats.base import LAYER_SCALE, CheckpointFormat
from vitreg_hub.conversion.formats.rules import keep
from vitreg_hub.network.position_rule import PositionRule

if TYPE_CHECKING:
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

WIDTH_64 = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Heads of 64 channels, at the widths that Meta and Google released; at width 1280 lineages differ."""

NO_ANTIALIAS = PositionRule(antialias=False)
"""deit/main.py and transformers' ViT, DeiT, CLIP and DINOv2 without registers."""

ATTENTION_AND_MLP = (
    keep("blocks.{i}.norm1.{x}"),
    keep("blocks.{i}.attn.qkv.{x}"),
    keep("blocks.{i}.attn.proj.{x}"),
    keep("blocks.{i}.norm2.{x}"),
    keep("blocks.{i}.mlp.fc1.{x}"),
    keep("blocks.{i}.mlp.fc2.{x}"),
)

STEM_AND_NORM = (
    keep("cls_token"),
    keep("pos_embed"),
    keep("patch_embed.proj.{x}"),
    keep("norm.{x}"),
)

TOWER = (*STEM_AND_NORM, *ATTENTION_AND_MLP, keep("blocks.{i}.ls1.gamma"), keep("blocks.{i}.ls2.gamma"))

HEADS = (keep("head.{x}"), keep("dist_token"), keep("head_dist.{x}"))


def has_plain_names(names: Container[str], prefix: str = "") -> bool:
    """Whether the names are those that several lineages share."""
    return all(f"{prefix}{name}.weight" in names for name in ("blocks.0.attn.qkv", "patch_embed.proj"))


class DeitFormat(CheckpointFormat):
    """DeiT, whose training saves the weights in a container."""

    def is_likely(self, checkpoint: Checkpoint) -> bool:
        """Whether there is a classifier in DeiT's container, without LayerScale."""
        names = checkpoint.infos
        is_contained = has_plain_names(names) and checkpoint.container == self.container
        return is_contained and "head.weight" in names and "blocks.0.ls1.gamma" not in names


DEIT = DeitFormat(
    name="deit",
    title="Meta's DeiT",
    rules=(*STEM_AND_NORM, *ATTENTION_AND_MLP, *HEADS),
    marks=(r"dist_token",),
    family="plain",
    heads=WIDTH_64,
    positions=NO_ANTIALIAS,
    crop_pct=0.875,
    container="model",
)

DEIT3 = CheckpointFormat(
    name="deit3",
    title="Meta's DeiT-III",
    rules=(
        *STEM_AND_NORM,
        *ATTENTION_AND_MLP,
        keep("blocks.{i}.gamma_1", "blocks.{i}.ls1.gamma"),
        keep("blocks.{i}.gamma_2", "blocks.{i}.ls2.gamma"),
        keep("head.{x}"),
    ),
    marks=(r"blocks\.\d+\.gamma_1",),
    family="deit3",
    heads={384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16},  # deit/models_v2.py
    other_rows=0,
    positions=NO_ANTIALIAS,
    needs=LAYER_SCALE,
    container="model",
)
