"""The names that timm, DeiT, DINO and DINOv2 share, and the formats that are little more: DeiT, DeiT-III, timm."""

from vitreg_hub.arch import IMAGENET_MEAN, IMAGENET_STD
from vitreg_hub.conversion.formats.rules import CheckpointFormat, drop, keep
from vitreg_hub.network.positions import PositionRule

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

LAYER_SCALE = (keep("blocks.{i}.ls1.gamma"), keep("blocks.{i}.ls2.gamma"))

TOWER = (*STEM_AND_NORM, *ATTENTION_AND_MLP, *LAYER_SCALE)

HEADS = (keep("head.{x}"), keep("dist_token"), keep("head_dist.{x}"))

DEIT = CheckpointFormat(
    name="deit",
    title="Meta's DeiT",
    rules=(*STEM_AND_NORM, *ATTENTION_AND_MLP, *HEADS),
    marks=(r"dist_token",),
    family="plain",
    heads=WIDTH_64,
    positions=NO_ANTIALIAS,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    crop_pct=0.875,
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
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

TIMM = CheckpointFormat(
    name="timm",
    title="timm",
    library="timm",
    rules=(
        *TOWER,
        *HEADS,
        keep("reg_token"),
        keep("norm_pre.{x}"),
        keep("fc_norm.{x}"),
        drop("pre_logits.{rest}", "a layer that timm no longer has"),
    ),
    prefixes=("timm_model.",),
    norm_eps=None,
    act=None,
    marks=(r"reg_token|norm_pre\.weight|fc_norm\.weight", r"blocks\.\d+\.attn\.qkv\.weight"),
    heads=WIDTH_64,
    other_rows=None,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
