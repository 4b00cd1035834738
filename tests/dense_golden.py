"""Recorded heads of DINOv2 and DINOv3 on patches, and the networks below them."""

from functools import cache

import timm
from checkpoints import GOLDEN, convert
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


@cache
def case(name: str) -> tuple[Tensors, Tensors, Tensors]:
    """Inputs, outputs, and weights where there are any."""
    files = [GOLDEN / name / f"{file}.safetensors" for file in ("inputs", "expected", "checkpoint")]
    inputs, expected, weights = (load_file(file) if file.exists() else {} for file in files)
    return inputs, expected, weights


def below(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def dinov3(weights: Tensors) -> nn.Module:
    """timm's network with the weights of the recorded DINOv3."""
    model = timm.create_model(
        "vit_small_patch16_dinov3_qkvb",
        num_classes=0,
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        num_reg_tokens=2,
        dynamic_img_size=True,
    )
    renamed = {"storage_tokens": "reg_token"}
    loaded = {}
    for name, tensor in weights.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if not name.endswith(("mask_token", "periods", "qkv.bias", "bias_mask")):
            loaded[renamed.get(name, name)] = tensor
    left = model.load_state_dict(loaded, strict=False)
    assert not left.unexpected_keys
    assert all(key.endswith(("q_bias", "v_bias", "k_bias")) for key in left.missing_keys), left.missing_keys
    for index, block in enumerate(model.blocks):
        query, _, value = weights[f"blocks.{index}.attn.qkv.bias"].chunk(3)  # the key's part is masked
        block.attn.q_bias.data, block.attn.v_bias.data = query, value
    return model.eval()


def dinov2(weights: Tensors, folder) -> nn.Module:
    """Our network with the weights of the recorded DINOv2, for images of any size."""
    save_file(weights, folder / "backbone.safetensors")
    return convert(folder / "backbone.safetensors", num_heads=2).build(dynamic_img_size=True)
