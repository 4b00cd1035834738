"""transformers' DINOv2, ViT and DeiT, in the names of its files and in those of its memory, and PH-Reg on top of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vitreg_hub.conversion.formats.base import DISTILLATION, LAYER_SCALE, REGISTERS, CheckpointFormat
from vitreg_hub.conversion.formats.dinov2 import MASK_TOKEN_WHY
from vitreg_hub.conversion.formats.rules import Rule, drop, keep, qkv
from vitreg_hub.conversion.formats.timm_format import NO_ANTIALIAS, WIDTH_64
from vitreg_hub.conversion.formats.transformers_format import TransformersFormat, mlp_width
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.position_rule import PositionRule

if TYPE_CHECKING:
    from vitreg_hub.bundle.model_bundle import ModelBundle

HALF = (0.5, 0.5, 0.5)
"""transformers/image_utils.py, IMAGENET_STANDARD_MEAN and _STD, the defaults of ViTImageProcessor."""

MASK_TOKEN = "embeddings.mask_token"

STEM = (
    keep("embeddings.cls_token", "cls_token"),
    keep("embeddings.position_embeddings", "pos_embed"),
    keep("embeddings.patch_embeddings.projection.{x}", "patch_embed.proj.{x}"),
    *drop(MASK_TOKEN, why=MASK_TOKEN_WHY),
    keep("layernorm.{x}", "norm.{x}"),
)


LAYER, V5_LAYER = "encoder.layer.{i}", "layers.{i}"


def _attention(disk: str, memory: str) -> tuple[Rule, ...]:
    """Attention of both spellings, on disk and in memory (transformers/conversion_mapping.py)."""
    return (
        *qkv(f"{disk}.attention.attention", "query", "key", "value"),
        *qkv(f"{memory}.attention", "q_proj", "k_proj", "v_proj"),
        keep(f"{disk}.attention.output.dense.{{x}}", "blocks.{i}.attn.proj.{x}"),
        keep(f"{memory}.attention.o_proj.{{x}}", "blocks.{i}.attn.proj.{x}"),
    )


DINOV2_TOWER = (
    *STEM,
    *_attention(LAYER, LAYER),
    keep(f"{LAYER}.norm{{n}}.{{x}}", "blocks.{i}.norm{n}.{x}"),
    keep(f"{LAYER}.layer_scale{{n}}.lambda1", "blocks.{i}.ls{n}.gamma"),
    keep(f"{LAYER}.mlp.fc{{n}}.{{x}}", "blocks.{i}.mlp.fc{n}.{x}"),
    keep(f"{LAYER}.mlp.weights_in.{{x}}", "blocks.{i}.mlp.fc1.{x}", swiglu=True),
    keep(f"{LAYER}.mlp.weights_out.{{x}}", "blocks.{i}.mlp.fc2.{x}", swiglu=True),
    keep(f"{LAYER}.mlp.gate_proj.{{x}}", "blocks.{i}.mlp.fc1.{x}", part=(0, 2), swiglu=True),
    keep(f"{LAYER}.mlp.up_proj.{{x}}", "blocks.{i}.mlp.fc1.{x}", part=(1, 2), swiglu=True),
    keep(f"{LAYER}.mlp.down_proj.{{x}}", "blocks.{i}.mlp.fc2.{x}", swiglu=True),
)

VIT_TOWER = (
    *STEM,
    *_attention(LAYER, V5_LAYER),
    *(keep(f"{layer}.layernorm_before.{{x}}", "blocks.{i}.norm1.{x}") for layer in (LAYER, V5_LAYER)),
    *(keep(f"{layer}.layernorm_after.{{x}}", "blocks.{i}.norm2.{x}") for layer in (LAYER, V5_LAYER)),
    keep(f"{LAYER}.intermediate.dense.{{x}}", "blocks.{i}.mlp.fc1.{x}"),
    keep(f"{LAYER}.output.dense.{{x}}", "blocks.{i}.mlp.fc2.{x}"),
    keep(f"{V5_LAYER}.mlp.fc{{n}}.{{x}}", "blocks.{i}.mlp.fc{n}.{x}"),
    *drop("pooler.dense.{x}", why="tanh layer on the class token, which timm does not have"),
)

TWO_INPUTS = "reads class token and mean patch side by side, timm's head reads one vector"


class HfDinov2Format(TransformersFormat):
    """transformers' DINOv2, whose configuration tells the MLP's width as a multiple of the channels."""

    def _own_settings(self, bundle: ModelBundle) -> dict[str, Any]:
        width, hidden = bundle.model_args["embed_dim"], mlp_width(bundle)
        registers = bundle.state_dict.get("reg_token")
        settings = {} if registers is None else {"num_register_tokens": registers.shape[1]}
        if bundle.spec.swiglu:
            if (int(width * 4 * 2 / 3) + 7) // 8 * 8 != hidden // 2:
                raise ConversionError(f"{self.title} has no SwiGLU of width {hidden // 2} for {width} channels.")
            return settings | {"mlp_ratio": 4, "use_swiglu_ffn": True, "hidden_act": "gelu"}
        if hidden % width:
            raise ConversionError(f"{self.title} has no MLP of width {hidden} for {width} channels.")
        return settings | {"mlp_ratio": hidden // width, "use_swiglu_ffn": False}


HF_DINOV2 = HfDinov2Format(
    name="hf-dinov2",
    title="transformers' Dinov2",
    rules=DINOV2_TOWER,
    outside=drop("classifier.{x}", why=TWO_INPUTS),
    prefixes=("dinov2.",),
    marks=(r"embeddings\.position_embeddings", r"encoder\.layer\.\d+\.layer_scale1\.lambda1"),
    family="dinov2",
    heads=WIDTH_64,
    positions=NO_ANTIALIAS,
    needs=LAYER_SCALE,
    mask_token=MASK_TOKEN,
    config_class="Dinov2Config",
    model_class="Dinov2Model",
)

HF_DINOV2_REGISTERS = dataclasses.replace(
    HF_DINOV2,
    name="hf-dinov2-with-registers",
    title="transformers' Dinov2WithRegisters",
    rules=(*DINOV2_TOWER, keep("embeddings.register_tokens", "reg_token")),
    prefixes=("dinov2_with_registers.",),
    marks=(*HF_DINOV2.marks, r"embeddings\.register_tokens"),
    positions=PositionRule(antialias=True),
    needs=LAYER_SCALE | REGISTERS,
    config_class="Dinov2WithRegistersConfig",
    model_class="Dinov2WithRegistersModel",
)

HF_VIT = TransformersFormat(
    name="hf-vit",
    title="transformers' ViT",
    rules=VIT_TOWER,
    outside=(keep("classifier.{x}", "head.{x}"),),
    prefixes=("vit.",),
    marks=(r"embeddings\.position_embeddings", r".*\.layernorm_before\.weight"),
    family="plain",
    norm_eps=None,
    positions=NO_ANTIALIAS,
    mean=HALF,
    std=HALF,
    config_class="ViTConfig",
    model_class="ViTModel",
    head_class="ViTForImageClassification",
    image_defaults={"interpolation": "bilinear", "crop_mode": "squash"},  # of ViTImageProcessor
)

HF_DEIT = TransformersFormat(
    name="hf-deit",
    title="transformers' DeiT",
    rules=(*VIT_TOWER, keep("embeddings.distillation_token", "dist_token")),
    outside=(
        keep("cls_classifier.{x}", "head.{x}"),
        keep("distillation_classifier.{x}", "head_dist.{x}"),
        *drop("classifier.{x}", why="reads the class token alone, timm's distilled model averages two heads"),
    ),
    prefixes=("deit.",),
    marks=(*HF_VIT.marks, r"embeddings\.distillation_token"),
    family="plain",
    norm_eps=None,
    other_rows=2,
    positions=NO_ANTIALIAS,
    needs=DISTILLATION,
    config_class="DeiTConfig",
    model_class="DeiTModel",
    head_class="DeiTForImageClassificationWithTeacher",
)


PH_REG = CheckpointFormat(
    name="ph-reg",
    title="PH-Reg's students",
    rules=DINOV2_TOWER,
    outside=(
        keep("registers", "reg_token"),  # before the class token there: blocks do not see the order of tokens
        *drop("embed.{rest}", "encoder.{rest}", "layernorm.{rest}", why="another name of the same weights"),
    ),
    prefixes=("model.",),
    marks=HF_DINOV2.marks,
    needs_prefix=True,
    family="dinov2",
    heads=WIDTH_64,
    positions=NO_ANTIALIAS,
    no_reference="PH-Reg's students have no library",
    is_exported=False,
)
