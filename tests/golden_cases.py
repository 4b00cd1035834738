"""Recorded checkpoints of the official implementations, with what these gave: tests/golden/, a meta.json in each."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import GOLDEN as FOLDER
from checkpoints import convert
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.tokens import block_tokens

ARGUMENTS: dict[str, dict[str, Any]] = {
    "deit3_eps_probe": {"num_heads": 4},
    "deit3_ls": {"num_heads": 4},
    "deit3_ls_head10": {"num_heads": 2},
    "deit_base": {"num_heads": 2},
    "deit_distilled": {"num_heads": 4},
    "dinov2_eps_probe": {"num_heads": 2},
    "dinov2_reg4": {"num_heads": 4},
    "dinov2_swiglu_reg4": {"num_heads": 2},
    "dinov2_teacher_checkpoint": {"num_heads": 2},
    "dinov2_vit_mlp_chunked": {"num_heads": 4},
    "dinov2_vit_mlp_hub": {"num_heads": 2},
    "hf_clip_vision": {},
    "hf_deit": {},
    "hf_dinov2": {},
    "hf_dinov2_reg": {},
    "hf_vit": {},
    "hf_vit_eps_probe": {},
    "openclip_eps_probe": {"num_heads": 2, "act": "gelu"},
    "openclip_full_module_pth": {"num_heads": 2, "act": "gelu"},
    "openclip_full_plain": {"num_heads": 4, "act": "quick_gelu"},
    "openclip_timm_tower": {"num_heads": 4},
    "openclip_vision_gelu": {"num_heads": 2, "act": "gelu"},
    "openclip_vision_quickgelu": {"num_heads": 4, "act": "quick_gelu"},
    "phreg_student": {"num_heads": 2},
    "ttr_clip": {"num_heads": 2, "act": "quick_gelu"},
    "ttr_dinov2": {"num_heads": 2},
}
"""Every case that is a ViT, with what its tensors do not tell."""

NORMED, UN_NORMED = 2e-5, 5e-5
"""Largest differences; the official code's own float32 noise is up to 9e-6 and 1.8e-5 (meta.json)."""


def source(case: str) -> Path:
    """The checkpoint: a file, or transformers' folder."""
    found = (FOLDER / case / name for name in ("model", "checkpoint.pth", "checkpoint.safetensors"))
    return next(path for path in found if path.exists())


@cache
def bundle(case: str) -> ModelBundle:
    """The converted checkpoint."""
    return convert(source(case), **ARGUMENTS[case])


@cache
def images(case: str) -> dict[tuple[int, int], Tensor]:
    """Normalised images by height and width."""
    inputs = load_file(FOLDER / case / "inputs.safetensors")
    sizes = {tuple(x.shape[2:]) for name, x in inputs.items() if name.startswith("image_")}
    return {(height, width): inputs[f"image_{height}x{width}"] for height, width in sorted(sizes)}


@cache
def native(case: str) -> tuple[int, int]:
    """Height and width of the checkpoint's own images."""
    return tuple(json.loads((FOLDER / case / "meta.json").read_text())["native_size"])


def recorded(case: str, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the official implementation gave, by our names."""
    prefix = f"{size[0]}x{size[1]}."
    raw = load_file(FOLDER / case / "expected.safetensors")
    return dict(_named(case, {k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)}))


def _named(case: str, raw: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = {
        "x_norm": "tokens",
        "x_norm_clstoken": "class token",
        "x_norm_regtokens": "registers",
        "x_norm_patchtokens": "patches",
        "x_norm_disttoken": "distillation token",
        "logits": "output",
        "image_embed": "output",
        "image_embeds": "output",
        "baseline.out": "output",
    }
    if "clip" not in case:  # where it has not passed the final norm
        names["last_hidden_state"] = "tokens"
    else:
        names["pooled"] = "class token"
    for name, tensor in raw.items():
        tensor = _class_first(tensor) if case == "phreg_student" else tensor
        if name in names:
            yield names[name], tensor
        elif name.startswith("block."):
            yield name, tensor
        elif name.startswith("hidden_states.") and name != "hidden_states.0":
            yield f"block.{int(name.rpartition('.')[2]) - 1}", tensor


def _class_first(tokens: Tensor) -> Tensor:
    """PH-Reg's six registers stand before the class token."""
    return torch.cat([tokens[:, 6:7], tokens[:, :6], tokens[:, 7:]], dim=1)


@torch.no_grad()
def outputs(model: VisionTransformer, x: Tensor) -> dict[str, Tensor]:
    """The same outputs of a timm model."""
    tokens = model.forward_features(x)
    first_patch = model.num_prefix_tokens
    depth = len(model.blocks)
    blocks = block_tokens(model, x, blocks=range(depth))
    return {
        "tokens": tokens,
        "class token": tokens[:, 0],
        "distillation token": tokens[:, 1],
        "registers": tokens[:, first_patch - model.num_reg_tokens : first_patch],
        "patches": tokens[:, first_patch:],
        "output": model.forward_head(tokens),
        **{f"block.{i}": torch.cat([t.cls, t.registers, t.patches], dim=1) for i, t in blocks.items()},
    }


def differences(case: str, size: tuple[int, int], ours: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of every recorded output that `ours` has."""
    return {
        name: (ours[name] - expected).abs().max().item()
        for name, expected in recorded(case, size).items()
        if name in ours
    }


def too_large(found: dict[str, float]) -> dict[str, float]:
    """Differences beyond what float32 explains."""
    return {k: v for k, v in found.items() if not v <= (UN_NORMED if k.startswith("block.") else NORMED)}
