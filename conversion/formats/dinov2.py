"""DINOv2 as Meta releases and trains it, and DINO v1 (facebookresearch/dinov2, facebookresearch/dino)."""

from vitreg_hub.arch import IMAGENET_MEAN, IMAGENET_STD
from vitreg_hub.conversion.formats.rules import CheckpointFormat, drop, keep
from vitreg_hub.conversion.formats.vit import ATTENTION_AND_MLP, STEM_AND_NORM, TOWER, WIDTH_64
from vitreg_hub.network.positions import PositionRule

OFFSET_RULE = PositionRule(antialias=False, offset=0.1)
"""dinov2/hub/backbones.py for models without registers, and dino/vision_transformer.py."""

MASK_TOKEN = "replaces masked patches in training only"

DINOV2 = CheckpointFormat(
    name="dinov2",
    title="Meta's DINOv2",
    rules=(
        *TOWER,
        keep("register_tokens", "reg_token"),
        drop("mask_token", MASK_TOKEN),
        # dinov2/layers/swiglu_ffn.py: gate and value in one matrix, or each in its own
        keep("blocks.{i}.mlp.w12.{x}", "blocks.{i}.mlp.fc1.{x}", swiglu=True),
        keep("blocks.{i}.mlp.w1.{x}", "blocks.{i}.mlp.fc1.{x}", part=(0, 2), swiglu=True),
        keep("blocks.{i}.mlp.w2.{x}", "blocks.{i}.mlp.fc1.{x}", part=(1, 2), swiglu=True),
        keep("blocks.{i}.mlp.w3.{x}", "blocks.{i}.mlp.fc2.{x}", swiglu=True),
    ),
    prefixes=("teacher.backbone.", "backbone."),
    outside=(
        drop("student.{rest}", "the student; the teacher, its moving average, is the model"),
        drop("teacher.dino_head.{rest}", "head of the training objective"),
        drop("teacher.ibot_head.{rest}", "head of the training objective"),
        drop("dino_head.{rest}", "head of the training objective"),
        drop("ibot_head.{rest}", "head of the training objective"),
        drop("dino_loss.{rest}", "state of the training objective"),
        drop("ibot_patch_loss.{rest}", "state of the training objective"),
    ),
    respell=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # block_chunks > 0: the second number is already global
    marks=(r"mask_token|register_tokens", r"blocks\.\d+\.(ls1\.gamma|mlp\.w12\.weight)"),
    family="dinov2",
    heads=WIDTH_64,
    positions=OFFSET_RULE,
    registers_positions=PositionRule(antialias=True),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)

DINO = CheckpointFormat(
    name="dino",
    title="Meta's DINO",
    rules=(*STEM_AND_NORM, *ATTENTION_AND_MLP),
    prefixes=("teacher.backbone.", "backbone."),
    outside=(
        drop("student.{rest}", "the student; the teacher, its moving average, is the model"),
        drop("teacher.head.{rest}", "head of the training objective"),
        drop("head.{rest}", "head of the training objective"),
    ),
    family="plain",
    heads=WIDTH_64,
    positions=OFFSET_RULE,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    crop_pct=0.875,
)
