"""Bundles of networks with another LayerNorm epsilon: stored with a scaled residual stream, built without."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from models import ONE_OF_EACH_KIND, TINY, randomised
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification

from vitreg_hub.bundle.doors import DOORS, verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError
from vitreg_hub.hf_models import VitRegBackbone, VitRegModel
from vitreg_hub.tokens import block_tokens

pytestmark = pytest.mark.usefixtures("warm")

EPS, SCALE = 9.5367431640625e-13, 1024.0
"""1e-6 / 2^20, the epsilon nearest to 1e-12 that can be stored, and its scale."""

ARCHS = ["vit_tiny_reg2_plain", "vit_tiny_reg0_deit_distilled"]
every_arch = pytest.mark.parametrize("arch", ARCHS)


def set_eps(model: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


@torch.no_grad()
def original(arch: str = ARCHS[0], *, eps: float = EPS, **settings) -> VisionTransformer:
    """A model with an epsilon that no entrypoint has, and with embeddings so small that it matters."""
    model = randomised(timm.create_model(arch, num_classes=10, **ONE_OF_EACH_KIND[arch] | settings))
    for name, parameter in model.named_parameters():
        if name.endswith("_token") or name.startswith(("pos_embed", "patch_embed")):
            nn.init.normal_(parameter, std=1e-3 if parameter.ndim < 4 else 1e-5)
        if name.startswith("blocks.") and ("proj" in name or "fc2" in name):
            parameter.mul_(1e-3)
    set_eps(model, eps)
    return model


def bundled(model: VisionTransformer, arch: str = ARCHS[0]) -> ModelBundle:
    return ModelBundle.from_timm(model, arch=arch, provenance=Provenance(origin="random weights"))


def images_for(model: VisionTransformer) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size)


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stream(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """The tokens [B, N, D] after every block."""
    found = block_tokens(model, images, blocks=range(len(model.blocks)))
    return [torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1) for tokens in found.values()]


@every_arch
def test_all_doors_give_the_same_numbers(arch, folder):
    bundle = bundled(original(arch), arch)
    assert bundle.residual_scale == SCALE
    bundle.save(folder)
    assert json.loads((folder / "config.json").read_text())["vitreg"]["residual_scale"] == 1024.0
    assert verify(folder) == dict.fromkeys(DOORS, 0.0)


@torch.no_grad()
@every_arch
def test_built_model_is_the_original_bit_for_bit(arch, folder):
    model = original(arch)
    images = images_for(model)
    built = ModelBundle.load(bundled(model, arch).save(folder)).build()
    assert {module.eps for module in built.modules() if isinstance(module, nn.LayerNorm)} == {EPS}
    assert all(torch.equal(tensor, built.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert equal(stream(built, images), stream(model, images))
    assert torch.equal(built(images), model(images))
    again = bundled(built, arch)
    assert again.residual_scale == SCALE
    stored = ModelBundle.load(folder).state_dict
    assert all(torch.equal(tensor, stored[name]) for name, tensor in again.state_dict.items())


@torch.no_grad()
def test_the_epsilon_matters():
    model = original()
    images = images_for(model)
    logits, states = model(images), stream(model, images)
    set_eps(model, 1e-6)
    assert (model(images) - logits).abs().max() > 0.1
    assert (stream(model, images)[-1] - states[-1]).abs().mean() > 0.1 * states[-1].abs().mean()


@torch.no_grad()
def test_plain_network_has_the_larger_stream(folder):
    model = original()
    images = images_for(model)
    stored = timm.create_model(f"local-dir:{bundled(model).save(folder)}", pretrained=True).eval()
    assert torch.equal(stored(images), model(images))
    for large, small in zip(stream(stored, images), stream(model, images), strict=True):
        assert torch.equal(large, small * SCALE)


def test_tensors_that_are_scaled():
    model = original()
    weights, stored = model.state_dict(), bundled(model).state_dict
    changed = {name for name, tensor in weights.items() if not torch.equal(stored[name], tensor)}
    ends = {"attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    blocks = {f"blocks.{i}.{end}" for i in range(TINY["depth"]) for end in ends}
    embeddings = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert changed == embeddings | blocks
    assert all(torch.equal(stored[name], weights[name] * SCALE) for name in changed)
    distilled = original(ARCHS[1])
    assert torch.equal(bundled(distilled, ARCHS[1]).state_dict["dist_token"], distilled.dist_token * SCALE)


# transformers


@pytest.fixture
def saved(folder: Path) -> tuple[VisionTransformer, Path]:
    model = original()
    return model, bundled(model).save(folder)


@torch.no_grad()
@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForImageClassification])
def test_hidden_states_are_the_originals(saved, model_class):
    model, folder = saved
    images = images_for(model)
    wrapped = model_class.from_pretrained(folder)
    states = wrapped(images, output_hidden_states=True).hidden_states
    assert len(states) == 1 + TINY["depth"]
    assert torch.equal(states[0], model._pos_embed(model.patch_embed(images)))
    assert equal(states[1:], stream(model, images))
    chosen = wrapped(images, output_hidden_states=[-1]).hidden_states
    assert [state is None for state in chosen] == [True] * TINY["depth"] + [False]
    assert torch.equal(chosen[-1], states[-1])
    assert wrapped(images).get("hidden_states") is None


@torch.no_grad()
def test_tokens_of_every_size_are_the_originals(saved):
    _, folder = saved
    images = torch.randn(2, 3, 32, 96)
    dynamic = ModelBundle.load(folder).build(dynamic_img_size=True)
    outputs = AutoModel.from_pretrained(folder)(images, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, dynamic.forward_features(images))
    assert torch.equal(outputs.hidden_states[-1], stream(dynamic, images)[-1])
    sized = ModelBundle.load(folder).build(img_size=(32, 96))
    assert torch.equal(sized.forward_features(images), outputs.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("normed", [True, False])
def test_feature_maps_are_the_originals(saved, normed):
    model, folder = saved
    images = images_for(model)
    backbone = VitRegBackbone.from_pretrained(folder, out_indices=[1, 3], apply_layernorm=normed)
    outputs = backbone(images, output_hidden_states=True)
    expected = model.forward_intermediates(images, indices=[0, 2], norm=normed, intermediates_only=True)
    assert equal(outputs.feature_maps, expected)
    assert equal(outputs.hidden_states[1:], stream(model, images))
    maps = ModelBundle.load(folder).build(features_only=True, out_indices=(0, 2))(images)
    assert equal(maps, outputs.feature_maps) == (not normed)


@torch.no_grad()
def test_saved_by_transformers(saved, tmp_path):
    model, folder = saved
    images = images_for(model)
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    again = ModelBundle.load(tmp_path / "second")
    assert again.residual_scale == SCALE
    assert torch.equal(again.build()(images), model(images))
    assert equal(stream(again.build(), images), stream(model, images))


@torch.no_grad()
def test_compile(saved):
    torch.compiler.reset()
    model, folder = saved
    wrapped, images = VitRegModel.from_pretrained(folder), images_for(model)
    expected = wrapped(images, output_hidden_states=True).hidden_states
    found = torch.compile(wrapped, fullgraph=True, backend="eager")(images, output_hidden_states=True).hidden_states
    assert equal(found, expected)


# What cannot be stored


@pytest.mark.parametrize(("eps", "scale"), {1e-6: 1.0, 1e-12: 1024.0, 2.5e-7: 2.0, 4e-6: 0.5}.items())
def test_epsilons_with_a_scale(eps, scale):
    bundle = bundled(original(eps=eps))
    assert bundle.residual_scale == scale
    assert bundle.build().norm.eps == pytest.approx(eps, rel=0.1)
    assert ("residual_scale" in bundle.to_json()["vitreg"]) == (scale != 1)


@pytest.mark.parametrize("eps", [1e-5, 1.05e-6, 5e-7, 0.0])
def test_epsilon_without_a_scale_is_refused(eps):
    with pytest.raises(BundleError, match=rf"the LayerNorms have epsilon {eps}, .* 1e-06 over a power of four"):
        bundled(original(eps=eps))


def test_different_epsilons_are_refused():
    model = original()
    model.norm.eps = 1e-6
    with pytest.raises(BundleError, match=r"have epsilon 9\.5367431640625e-13, 1e-06, but"):
        bundled(model)


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("vit_nano_reg4", {}),
        ("vit_base_reg8_clip", {}),
        ("vit_tiny_reg2_plain", {"init_values": 1e-5}),
        ("vit_tiny_reg2_plain", {"pre_norm": True}),
        ("vit_tiny_reg2_plain", {"global_pool": "avg"}),  # its tokens do not pass a norm
    ],
)
def test_network_that_cannot_be_scaled_is_refused(arch, settings):
    model = original(arch, eps=1e-5 / 4**10 if arch.endswith("clip") else EPS, **settings)
    with pytest.raises(BundleError, match="residual_scale needs a network without norm_pre and LayerScale"):
        bundled(model, arch)


@torch.no_grad()
def test_norms_inside_attention_keep_their_epsilon():
    model = original(qk_norm=True)
    for block in model.blocks:
        block.attn.q_norm.eps = block.attn.k_norm.eps = 1e-6
    images = images_for(model)
    built = bundled(model).build()
    assert {block.attn.q_norm.eps for block in built.blocks} == {1e-6}
    assert torch.equal(built(images), model(images))
