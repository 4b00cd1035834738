"""Small models for tests: rows of the table, with weights under which nothing can hide."""

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance

TINY = {"depth": 3, "embed_dim": 32, "num_heads": 2}
ONE_OF_EACH_KIND = {
    "vit_nano_reg4": {},
    "vit_small_reg0": TINY | {"img_size": 56},
    "vit_giant_reg2": TINY | {"img_size": 56},  # SwiGLU
    "vit_base_reg1_deit3": TINY | {"img_size": 64},
    "vit_base_reg8_clip": TINY | {"img_size": (48, 64)},  # pre-norm, a rectangle
    "vit_giant_reg16_clip_quickgelu": TINY | {"img_size": 56},  # activation by name
    "vit_tiny_reg2_plain": TINY | {"img_size": 64},  # no LayerScale
    "vit_tiny_reg0_deit_distilled": TINY | {"img_size": (48, 64)},  # two tokens with positions, two heads
}
"""Architectures with overrides that shrink them, one for every way in which rows differ."""


@torch.no_grad()
def randomised(model: VisionTransformer, *, seed: int = 0) -> VisionTransformer:
    """Draw every parameter away from its default; LayerScale around 0.5, so that blocks are not hidden behind 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 and "token" not in name and "embed" not in name else 4
        nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)
        if name.endswith("gamma"):
            parameter.mul_(0.3).add_(0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.mul_(0.4).add_(1.0)
    return model.eval()


def random_bundle(arch: str = "vit_nano_reg4", *, num_classes: int = 10, **timm_kwargs) -> ModelBundle:
    """A bundle of an architecture with random weights."""
    model = randomised(timm.create_model(arch, num_classes=num_classes, **timm_kwargs))
    labels = tuple(f"class {i}" for i in range(num_classes)) or None
    told = Provenance(origin="random weights", license="mit")
    return ModelBundle.from_timm(model, arch=arch, provenance=told, label_names=labels)
