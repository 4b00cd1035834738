"""One network, three implementations: ours, timm's DINOv2 with registers, transformers' `Dinov2WithRegistersModel`."""

from collections.abc import Iterator

import pytest
import timm
import torch
from models import randomised
from timm.models import VisionTransformer
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import vitreg_hub  # noqa: F401  (registers the models)
from vitreg_hub.hf_models import VitRegConfig, VitRegModel

ARCH, TIMM_NAME = "vit_small_reg4", "vit_small_patch14_reg4_dinov2"
SIZES = {"native": (518, 518), "smaller": (224, 224), "rectangle": (280, 168)}

NAMES = {  # ours -> transformers', as far as they differ
    "norm.": "layernorm.",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "blocks.": "encoder.layer.",
    "attn.proj.": "attention.o_proj.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


@pytest.fixture(scope="module")
def ours() -> VisionTransformer:
    return randomised(timm.create_model(ARCH, dynamic_img_size=True, num_classes=0))


def renamed(state_dict: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same weights as transformers' class names them."""
    for name, tensor in state_dict.items():
        if name == "pos_embed":
            # theirs has a row for the class token; the weights of ours were folded into the token, so it is zero
            yield "embeddings.position_embeddings", torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        elif ".attn.qkv." in name:
            block, kind = name.removeprefix("blocks.").split(".attn.qkv.")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"encoder.layer.{block}.attention.{letter}_proj.{kind}", part
        else:
            for old, new in NAMES.items():
                name = new + name.removeprefix(old) if name.startswith(old) else name.replace("." + old, "." + new)
            yield name, tensor


@pytest.fixture(scope="module")
def theirs(ours: VisionTransformer) -> Dinov2WithRegistersModel:
    config = Dinov2WithRegistersConfig(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14
    )
    model = Dinov2WithRegistersModel(config).eval()
    left = model.load_state_dict(dict(renamed(ours.state_dict())), strict=False)
    assert left.missing_keys == ["embeddings.mask_token"]  # for masked training only
    assert left.unexpected_keys == []
    return model


@pytest.fixture(scope="module")
def wrapped(ours: VisionTransformer) -> VitRegModel:
    model = VitRegModel(VitRegConfig(arch=ARCH)).eval()
    model.load_state_dict(ours.state_dict())
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_tokens_agree(ours, wrapped, theirs, size):
    pixels = torch.randn(1, 3, *size)
    tokens = ours.forward_features(pixels)
    upstream = timm.create_model(TIMM_NAME, dynamic_img_size=True, num_classes=0).eval()
    upstream.load_state_dict(ours.state_dict())
    assert torch.equal(upstream.forward_features(pixels), tokens)

    outputs, expected = (model(pixels, output_hidden_states=True) for model in (wrapped, theirs))
    assert torch.equal(outputs.last_hidden_state, tokens)
    assert expected.last_hidden_state.std() > 0.5  # far from zero, so that the bounds mean something
    assert (outputs.last_hidden_state - expected.last_hidden_state).abs().max() < 1e-5
    assert (outputs.pooler_output - expected.pooler_output).abs().max() < 1e-5
    for state, other in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert (state - other).abs().max() < 1e-5
