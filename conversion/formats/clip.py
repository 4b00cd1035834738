"""CLIP's vision towers: OpenAI's archive, OpenCLIP's checkpoints, and transformers' CLIP models."""

from vitreg_hub.arch import CLIP_MEAN, CLIP_STD
from vitreg_hub.conversion.formats.rules import CheckpointFormat, Reshape, drop, keep, qkv
from vitreg_hub.conversion.formats.vit import NO_ANTIALIAS, TOWER
from vitreg_hub.network.positions import PositionRule

TEXT_TOWER = "text tower; --text-tower keeps it"
ARCHIVE_NUMBER = "a number of OpenAI's archive, not a weight"

VISUAL = (
    keep("class_embedding", "cls_token", reshape=Reshape.TOKEN),
    keep("positional_embedding", "pos_embed", reshape=Reshape.TABLE),
    keep("conv1.weight", "patch_embed.proj.weight"),
    keep("ln_pre.{x}", "norm_pre.{x}"),
    keep("ln_post.{x}", "norm.{x}"),
    keep("proj", "head.weight", reshape=Reshape.TRANSPOSE),
    keep("transformer.resblocks.{i}.ln_1.{x}", "blocks.{i}.norm1.{x}"),
    keep("transformer.resblocks.{i}.attn.in_proj_{x}", "blocks.{i}.attn.qkv.{x}"),
    keep("transformer.resblocks.{i}.attn.out_proj.{x}", "blocks.{i}.attn.proj.{x}"),
    keep("transformer.resblocks.{i}.ls_1.gamma", "blocks.{i}.ls1.gamma"),
    keep("transformer.resblocks.{i}.ln_2.{x}", "blocks.{i}.norm2.{x}"),
    keep("transformer.resblocks.{i}.mlp.c_fc.{x}", "blocks.{i}.mlp.fc1.{x}"),
    keep("transformer.resblocks.{i}.mlp.c_proj.{x}", "blocks.{i}.mlp.fc2.{x}"),
    keep("transformer.resblocks.{i}.ls_2.gamma", "blocks.{i}.ls2.gamma"),
)

TEXT = (
    drop("transformer.{rest}", TEXT_TOWER),
    drop("token_embedding.weight", TEXT_TOWER),
    drop("positional_embedding", TEXT_TOWER),
    drop("ln_final.{x}", TEXT_TOWER),
    drop("text_projection", TEXT_TOWER),
    drop("text_projection.{x}", TEXT_TOWER),
    drop("text.{rest}", TEXT_TOWER),
    drop("logit_scale", TEXT_TOWER),
    drop("logit_bias", TEXT_TOWER),
)

HEADS = {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1408: 16, 1664: 16, 1792: 16}
"""open_clip/model_configs/*.json (width over head_width), without 1280, which has 16 there and 20 elsewhere."""

OPENCLIP_RULE = PositionRule(antialias=True, keep_equal_count=True)

OPENCLIP = CheckpointFormat(
    name="openclip",
    title="OpenCLIP",
    library="open_clip",
    rules=VISUAL,
    outside=TEXT,
    prefixes=("visual.",),
    alone_when_bare=True,
    marks=("class_embedding", r"conv1\.weight", r"transformer\.resblocks\.\d+\.ln_1\.weight"),
    norm_eps=1e-5,
    act=None,
    heads=HEADS,
    positions=OPENCLIP_RULE,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    head_bias=False,
)

OPENAI = CheckpointFormat(
    name="openai",
    title="OpenAI's CLIP",
    library="open_clip",
    rules=VISUAL,
    outside=(
        *TEXT,
        drop("input_resolution", ARCHIVE_NUMBER),
        drop("context_length", ARCHIVE_NUMBER),
        drop("vocab_size", ARCHIVE_NUMBER),
    ),
    prefixes=("visual.",),
    alone_when_bare=True,
    norm_eps=1e-5,
    act="quick_gelu",
    heads=HEADS,
    positions=OPENCLIP_RULE,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    head_bias=False,
)

OPENCLIP_TIMM = CheckpointFormat(
    name="openclip-timm",
    title="OpenCLIP with a timm tower",
    library="open_clip",
    rules=(*TOWER, keep("reg_token"), keep("norm_pre.{x}"), keep("fc_norm.{x}"), keep("head.{x}")),
    outside=(keep("visual.head.proj.{x}", "head.{x}"), *TEXT),
    prefixes=("visual.trunk.",),
    marks=(r"blocks\.\d+\.attn\.qkv\.weight", r"patch_embed\.proj\.weight"),
    needs_prefix=True,
    norm_eps=None,
    act=None,
    heads={192: 3, 384: 6, 512: 8, 768: 12, 1024: 16},
    other_rows=None,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    head_bias=False,
)

HF_CLIP = CheckpointFormat(
    name="hf-clip",
    title="transformers' CLIP",
    library="transformers",
    rules=(
        keep("embeddings.class_embedding", "cls_token", reshape=Reshape.TOKEN),
        keep("embeddings.position_embedding.weight", "pos_embed", reshape=Reshape.TABLE),
        drop("embeddings.position_ids", "a list of numbers, not a weight"),
        keep("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        keep("pre_layrnorm.{x}", "norm_pre.{x}"),
        keep("post_layernorm.{x}", "norm.{x}"),
        keep("encoder.layers.{i}.layer_norm1.{x}", "blocks.{i}.norm1.{x}"),
        *qkv(
            "encoder.layers.{i}.self_attn.q_proj.{x}",
            "encoder.layers.{i}.self_attn.k_proj.{x}",
            "encoder.layers.{i}.self_attn.v_proj.{x}",
        ),
        keep("encoder.layers.{i}.self_attn.out_proj.{x}", "blocks.{i}.attn.proj.{x}"),
        keep("encoder.layers.{i}.layer_norm2.{x}", "blocks.{i}.norm2.{x}"),
        keep("encoder.layers.{i}.mlp.fc1.{x}", "blocks.{i}.mlp.fc1.{x}"),
        keep("encoder.layers.{i}.mlp.fc2.{x}", "blocks.{i}.mlp.fc2.{x}"),
    ),
    outside=(
        keep("visual_projection.weight", "head.weight"),
        drop("text_model.{rest}", "text tower"),
        drop("text_projection.weight", "text tower"),
        drop("logit_scale", "text tower"),
    ),
    prefixes=("vision_model.",),
    marks=(r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
    norm_eps=None,
    act=None,
    positions=NO_ANTIALIAS,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    head_bias=False,
    needs_config=True,
)
