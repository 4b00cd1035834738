"""The names that timm, DeiT, DINO and DINOv2 share, and the formats that are little more: DeiT and DeiT-III."""

from collections.abc import Container

from vitreg_hub.conversion.formats.base import LAYER_SCALE, CheckpointFormat
from vitreg_hub.conversion.formats.rules import keep, same
from vitreg_hub.network.position_rule import PositionRule

WIDTH_64 = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Heads of 64 channels, at the widths that Meta and Google released; at width 1280 lineages differ."""

NO_ANTIALIAS = PositionRule(antialias=False)
"""deit/main.py and transformers' ViT, DeiT, CLIP and DINOv2 without registers."""

ATTENTION = same("blocks.{i}.attn.qkv.{x}", "blocks.{i}.attn.proj.{x}")
ATTENTION_AND_MLP = (*ATTENTION, *same("blocks.{i}.norm{n}.{x}", "blocks.{i}.mlp.fc{n}.{x}"))
STEM_AND_NORM = same("cls_token", "pos_embed", "patch_embed.proj.{x}", "norm.{x}")
TOWER = (*STEM_AND_NORM, *ATTENTION_AND_MLP, *same("blocks.{i}.ls{n}.gamma"))
HEADS = same("head.{x}", "dist_token", "head_dist.{x}")


def has_plain_names(names: Container[str], prefix: str = "") -> bool:
    """Whether the names are those that several lineages share."""
    return all(f"{prefix}{name}.weight" in names for name in ("blocks.0.attn.qkv", "patch_embed.proj"))


DEIT = CheckpointFormat(
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
        keep("blocks.{i}.gamma_{n}", "blocks.{i}.ls{n}.gamma"),
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
