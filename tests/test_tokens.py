"""The token view against timm's and transformers' own outputs, and against attention that they form themselves."""

import pytest
import timm
import torch
import transformers
from models import ONE_OF_EACH_KIND, TINY, random_bundle, randomised
from torch import nn
from transformers import AutoModel

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import DataError
from vitreg_hub.tokens import attention_maps, block_tokens, observe

OTHERS_OF_TIMM = {
    "vit_base_patch16_siglip_224": TINY | {"img_size": 64},  # no class token
    "vit_small_patch16_dinov3": TINY | {"img_size": 64},  # Eva, rotary, registers
    "vit_tiny_r_s16_p8_224": TINY | {"img_size": 64},  # a convolutional network before the patches
    "beit_base_patch16_224": TINY | {"img_size": 64},  # relative positions
    "vit_base_patch16_224": TINY | {"img_size": 64, "global_pool": "avg"},  # normed after pooling
}
ALL_OF_TIMM = ONE_OF_EACH_KIND | OTHERS_OF_TIMM

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
WIDE = SMALL | {"intermediate_size": 64}
HF_MODELS = {
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**SMALL), 1, 0),
    "registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3),
        1,
        3,
    ),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig(**WIDE, num_register_tokens=2), 1, 2),
    "vit": (transformers.ViTModel, transformers.ViTConfig(**WIDE), 1, 0),
    "vit head": (transformers.ViTForImageClassification, transformers.ViTConfig(**WIDE), 1, 0),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig(**WIDE), 2, 0),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**WIDE), 1, 0),
    "clip projection": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig(**WIDE), 1, 0),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(**WIDE), 0, 0),
}
"""Class, configuration, class tokens, registers."""
KERNELS = ("eager", "sdpa", "flex_attention")


@pytest.fixture(params=ALL_OF_TIMM)
def vit(request):
    return randomised(timm.create_model(request.param, num_classes=0, **ALL_OF_TIMM[request.param]))


def hf_model(name: str, kernel: str = "eager"):
    model_class, config, num_class, num_registers = HF_MODELS[name]
    config = type(config).from_dict(config.to_dict() | {"attn_implementation": kernel})
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=kernel)
    return randomised(model), num_class, num_registers


def images_for(vit):
    return torch.randn(2, 3, *vit.patch_embed.img_size)


@torch.no_grad()
def test_block_tokens_are_timms_intermediates(vit):
    images = images_for(vit)
    seen = block_tokens(vit, images, blocks=(0, -1))
    (first, last) = vit.forward_intermediates(
        images,
        indices=[0, len(vit.blocks) - 1],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    for ours, theirs in ((seen[0], first), (seen[-1], last)):
        patches, prefix = theirs if vit.num_prefix_tokens else (theirs, images.new_zeros(2, 0, 32))
        assert torch.equal(ours.patches, patches)
        assert torch.equal(torch.cat([ours.cls, ours.registers], dim=1), prefix)
        assert ours.registers.shape[1] == (0 if getattr(vit, "reg_token", None) is None else vit.reg_token.shape[1])


@torch.no_grad()
def test_normed_tokens_are_timms_features(vit):
    images = images_for(vit)
    seen = observe(vit, images, normed=True).normed
    features = vit.forward_features(images)
    norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else nn.Identity()
    assert torch.equal(torch.cat([seen.cls, seen.registers, seen.patches], dim=1), norm(features))


@torch.no_grad()
def test_normed_tokens_of_any_block_are_timms_intermediates(vit):
    images = images_for(vit)
    seen = observe(vit, images, normed_blocks=(1, 0)).normed_blocks
    norm = vit.fc_norm if isinstance(vit.norm, nn.Identity) else nn.Identity()
    how = {"indices": [0, 1], "norm": True, "output_fmt": "NLC", "intermediates_only": True}
    for index, patches in enumerate(vit.forward_intermediates(images, **how)):
        assert torch.equal(seen[index].patches, norm(patches))


@torch.no_grad()
def test_logits_are_those_of_the_head():
    images = torch.randn(2, 3, 32, 32)
    timms = random_bundle().build()
    assert torch.equal(observe(timms, images, logits=True, normed=True).logits, timms(images))
    config = transformers.ViTConfig(**WIDE, num_labels=7)
    theirs = randomised(transformers.ViTForImageClassification(config))
    for side in (64, 32):
        large = torch.randn(2, 3, side, side)
        expected = theirs(large, interpolate_pos_encoding=side != 64).logits
        assert torch.equal(observe(theirs, large, logits=True).logits, expected)
    for headless in (random_bundle(num_classes=0).build(), hf_model("dinov2")[0]):
        with pytest.raises(DataError, match="cannot classify"):
            observe(headless, images if hasattr(headless, "blocks") else torch.randn(2, 3, 64, 64), logits=True)


def test_embedded_patches_are_timms(vit):
    images = images_for(vit)
    embedded = vit.patch_embed(images)
    assert torch.equal(observe(vit, images, embedded=True).embedded, embedded.reshape(2, -1, embedded.shape[-1]))


def test_attention_maps_are_what_unfused_timm_computes(vit):
    images = images_for(vit)
    ours = attention_maps(vit, images, blocks=(1, -1))
    unfused = {}
    for index in (1, -1):
        layer = vit.blocks[index].attn
        layer.fused_attn = False
        layer.attn_drop.register_forward_hook(lambda m, args, output, index=index: unfused.update({index: args[0]}))
    vit.forward_features(images)
    assert ours.keys() == unfused.keys()
    for index, seen in ours.items():
        assert (seen.weights - unfused[index]).abs().max() < 1e-6
        assert torch.allclose(seen.weights.sum(-1), torch.ones(()))
        prefix = vit.num_prefix_tokens
        maps = torch.cat([seen.cls, seen.registers], dim=2).flatten(3)
        assert torch.equal(maps, seen.weights[:, :, :prefix, prefix:])
    first = observe(vit, images, attention=(1,), attention_images=1).attention[1].weights
    assert len(first) == 1
    assert (first - unfused[1][:1]).abs().max() < 1e-6


def whole(tokens) -> torch.Tensor:
    return torch.cat([tokens.cls, tokens.registers, tokens.patches], dim=1)


def heads_of(tokens, layer) -> torch.Tensor:
    """[B, H, N, D / H]."""
    return whole(tokens).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_nano_reg4", "vit_small_reg0", "vit_base_reg8_clip", "vit_base_patch16_224"])
def test_projections_are_what_timms_layer_gives(name):
    vit = randomised(timm.create_model(name, num_classes=0, **ALL_OF_TIMM[name]))
    images, found = images_for(vit), {}
    for index in (1, -1):
        vit.blocks[index].attn.qkv.register_forward_hook(
            lambda module, args, output, index=index: found.setdefault(index, output)
        )
    vit.forward_features(images)
    seen = observe(vit, images, projections=(1, -1)).projections
    assert seen.keys() == found.keys() == {1, -1}
    for index, fused in found.items():
        ours = [whole(tokens) for tokens in (seen[index].queries, seen[index].keys, seen[index].values)]
        assert torch.equal(torch.cat(ours, dim=2), fused)
        assert seen[index].keys.registers.shape[1] == (0 if vit.reg_token is None else vit.reg_token.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3_qkvb"])
def test_biases_that_stand_apart_are_part_of_projections(name, fused, monkeypatch):
    extra = {} if name.startswith("beit") else {"qkv_fused": fused}
    vit = randomised(timm.create_model(name, num_classes=0, **TINY | {"img_size": 56 if "14" in name else 64}, **extra))
    layer, images, found = vit.blocks[1].attn, images_for(vit), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def record(queries, keys, values, **kwargs):
        found.append((queries, keys, values))
        return attend(queries, keys, values, **kwargs)

    seen = observe(vit, images, projections=(1,)).projections[1]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    vit.forward_features(images)
    queries, keys, values = found[1]
    assert torch.allclose(heads_of(seen.values, layer), values, atol=1e-6)
    # the class token is not rotated
    assert torch.allclose(heads_of(seen.queries, layer)[:, :, 0], queries[:, :, 0], atol=1e-6)
    assert torch.allclose(heads_of(seen.keys, layer)[:, :, 0], keys[:, :, 0], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", HF_MODELS)
def test_projections_are_what_transformers_kernel_is_given(name, monkeypatch):
    model, *_ = hf_model(name)
    images, found = torch.randn(2, 3, 64, 64), []
    seen = observe(model, images, projections=(-2,)).projections[-2]

    def record(module, queries, keys, values, *args, **kwargs):
        found.append((queries, keys, values))
        return attend(module, queries, keys, values, *args, **kwargs)

    attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    transformers.AttentionInterface.register("recording", record)
    model.set_attn_implementation("recording")
    model(pixel_values=images)
    heads = type("Heads", (), {"num_heads": 2})
    rotated = slice(0, 1) if name == "dinov3" else slice(None)
    for ours, theirs in zip((seen.queries, seen.keys, seen.values), found[1], strict=True):
        assert torch.allclose(heads_of(ours, heads)[:, :, rotated], theirs[:, :, rotated], atol=1e-6)


def test_attention_is_cut_by_name():
    vit = randomised(timm.create_model("vit_base_reg8_clip", num_classes=0, **ONE_OF_EACH_KIND["vit_base_reg8_clip"]))
    seen = attention_maps(vit, torch.randn(2, 3, 48, 64))[-1]
    assert seen.cls.shape == (2, 2, 1, 3, 4)
    assert seen.registers.shape == (2, 2, 8, 3, 4)
    assert torch.equal(seen.cls[1, 0, 0, 2, 1], seen.weights[1, 0, 0, 9 + 2 * 4 + 1])
    assert torch.equal(seen.registers[0, 1, 5, 0, 3], seen.weights[0, 1, 6, 9 + 3])


@pytest.mark.parametrize(
    "name", ["vit_base_reg8_clip", "vit_small_patch16_dinov3", "beit_base_patch16_224", "clip", "vit"]
)
def test_attention_of_some_images_is_that_of_all(name):
    if name in HF_MODELS:
        model, *_ = hf_model(name, "sdpa")
        images = torch.randn(5, 3, 64, 64)
    else:
        model = randomised(timm.create_model(name, num_classes=0, **ALL_OF_TIMM[name]))
        images = torch.randn(5, 3, *model.patch_embed.img_size)
    some, whole = (observe(model, images, attention=(1,), attention_images=n).attention[1].weights for n in (2, None))
    assert (len(some), len(whole)) == (2, 5)
    assert (some - whole[:2]).abs().max() < 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", HF_MODELS)
def test_transformers_models_show_their_own_outputs(name, kernel):
    model, num_class, num_registers = hf_model(name, kernel)
    images = torch.randn(2, 3, 64, 64)
    seen = observe(model, images, norms=True, blocks=(0, -1), attention=(0, -1))
    assert (seen.order.num_class, seen.order.num_registers, seen.order.grid) == (num_class, num_registers, (4, 4))

    model.set_attn_implementation("eager")
    theirs = model(pixel_values=images, output_hidden_states=True, output_attentions=True)
    assert (seen.input_norms - theirs.hidden_states[0].norm(dim=-1)).abs().max() < 1e-5
    for block, index in ((0, 1), (-1, 3)):
        tokens = torch.cat([getattr(seen.tokens[block], part) for part in ("cls", "registers", "patches")], dim=1)
        assert (tokens - theirs.hidden_states[index]).abs().max() < 1e-5
        assert (seen.attention[block].weights - theirs.attentions[block]).abs().max() < 1e-6
        assert (seen.norms[block] - theirs.hidden_states[index].norm(dim=-1)).abs().max() < 1e-4
    model.set_attn_implementation(kernel)
    first = observe(model, images, attention=(1,), attention_images=1).attention[1].weights
    assert len(first) == 1
    assert (first - theirs.attentions[1][:1]).abs().max() < 1e-6


def test_final_norm_of_transformers_models():
    images = torch.randn(2, 3, 64, 64)
    for name in ("dinov2", "registers", "dinov3", "vit", "deit", "siglip"):
        model, *_ = hf_model(name)
        seen = observe(model, images, normed=True).normed
        theirs = model(pixel_values=images).last_hidden_state
        assert (torch.cat([seen.cls, seen.registers, seen.patches], dim=1) - theirs).abs().max() < 1e-6
    model, *_ = hf_model("clip")  # whose norm is for the class token only
    assert (observe(model, images, normed=True).normed.cls[:, 0] - model(images).pooler_output).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3", "vit", "clip"])
def test_transformers_models_at_another_size(name):
    model, *_ = hf_model(name)
    seen = observe(model, torch.randn(1, 3, 96, 48), blocks=(-1,))
    assert seen.order.grid == (6, 3)
    assert seen.tokens[-1].patches.shape == (1, 18, 32)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bundle_in_transformers_shows_what_it_shows_in_timm(folder, kernel):
    bundle = random_bundle("vit_tiny_reg2_plain", **ONE_OF_EACH_KIND["vit_tiny_reg2_plain"])
    bundle.save(folder)
    images = torch.randn(2, 3, 64, 64)
    theirs = AutoModel.from_pretrained(folder, attn_implementation=kernel)
    expected, seen = (
        observe(model, images, norms=True, blocks=(1,), attention=(1,), embedded=True, normed=True)
        for model in (bundle.build(), theirs)
    )
    assert seen.order == expected.order
    for a, b in (
        (seen.norms, expected.norms),
        (seen.tokens[1].patches, expected.tokens[1].patches),
        (seen.attention[1].weights, expected.attention[1].weights),
        (seen.normed.registers, expected.normed.registers),
        (seen.embedded, expected.embedded),
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_scaled_bundle_shows_the_stream_of_the_model_that_it_stands_for(folder):
    vit = randomised(timm.create_model("vit_tiny_reg2_plain", **ONE_OF_EACH_KIND["vit_tiny_reg2_plain"]))
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    bundle = ModelBundle.from_timm(vit, arch="vit_tiny_reg2_plain", provenance=Provenance(origin="random"))
    assert bundle.residual_scale > 1
    bundle.save(folder)
    images = torch.randn(2, 3, 64, 64)
    expected, seen = (
        observe(model, images, norms=True, blocks=(-1,), embedded=True, normed=True)
        for model in (vit, AutoModel.from_pretrained(folder))
    )
    assert torch.allclose(seen.norms, expected.norms, rtol=1e-5)
    assert torch.allclose(seen.tokens[-1].patches, expected.tokens[-1].patches, atol=1e-5)
    assert torch.allclose(seen.embedded, expected.embedded, atol=1e-6)
    assert torch.allclose(seen.normed.patches, expected.normed.patches, atol=1e-5)


def test_nothing_is_left_on_the_model(vit):
    images = images_for(vit)
    with torch.no_grad():
        before = vit(images)
    state = {name: vars(module).copy() for name, module in vit.named_modules()}
    observe(vit, images, norms=True, blocks=(0, -1), normed=True, embedded=True, attention=(0, 1))
    with torch.no_grad():
        assert torch.equal(vit(images), before)
    for name, module in vit.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert vars(module) == state[name]


def test_a_model_in_training_stays_in_training_and_is_seen_without_dropout():
    settings = TINY | {"img_size": 64, "drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5}
    vit = randomised(timm.create_model("vit_base_patch16_224", patch_drop_rate=0.5, **settings))
    images = torch.randn(2, 3, 64, 64)
    expected = observe(vit, images, norms=True, attention=(-1,))
    vit.train()
    vit.blocks[1].eval()  # someone froze it
    seen = observe(vit, images, norms=True, attention=(-1,))
    assert torch.equal(seen.norms, expected.norms)
    assert torch.equal(seen.attention[-1].weights, expected.attention[-1].weights)
    assert [block.training for block in vit.blocks] == [True, False, True]
    assert not seen.norms.requires_grad
    vit(images).sum().backward()
    assert vit.pos_embed.grad is not None


def test_compiled_and_parallel_models_are_seen_through(tmp_path):
    vit = randomised(timm.create_model("vit_nano_reg4"))
    images = torch.randn(2, 3, 32, 32)
    expected = observe(vit, images, norms=True).norms
    for wrapped in (torch.compile(vit), nn.DataParallel(vit), torch.compile(nn.DataParallel(vit))):
        assert torch.equal(observe(wrapped, images, norms=True).norms, expected)


def test_compiled_blocks_are_seen_through():
    vit = randomised(timm.create_model("vit_nano_reg4"))
    images = torch.randn(2, 3, 32, 32)
    expected = observe(vit, images, norms=True, attention=(-1,))
    vit.blocks[0] = torch.compile(vit.blocks[0], backend="eager")
    vit.blocks[-1].compile(backend="eager")
    with torch.no_grad():
        vit(images)  # compiles
    seen = observe(vit, images, norms=True, attention=(-1,))
    assert torch.equal(seen.norms, expected.norms)
    assert torch.equal(seen.attention[-1].weights, expected.attention[-1].weights)


def test_half_precision_norms_are_computed_in_single_precision():
    vit = randomised(timm.create_model("vit_nano_reg4")).bfloat16()
    seen = observe(vit, torch.randn(2, 3, 32, 32), norms=True, blocks=(-1,))
    assert seen.norms.dtype == torch.float32
    assert torch.equal(seen.norms[-1][:, 5:], seen.tokens[-1].patches.float().norm(dim=-1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("resnet18", {}),
        ("swin_tiny_patch4_window7_224", {}),
        ("samvit_base_patch16", {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2}),
        ("vitamin_small_224", {"img_size": 64}),  # a convolutional stem that keeps no projection
        ("vit_base_patch16_18x2_224", TINY | {"img_size": 64}),  # two attentions beside each other
    ],
)
def test_what_is_no_plain_vit_is_refused_with_what_can_be_read(name, settings):
    model = timm.create_model(name, **settings)
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(DataError, match="can") as caught:
        observe(model, images, norms=True, attention=(0,))
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused_where_the_model_takes_one_only():
    with pytest.raises(DataError, match="64 x 64 pixels, but the model was built for 32 x 32: give img_size"):
        observe(timm.create_model("vit_nano_reg4"), torch.randn(1, 3, 64, 64), norms=True)


def test_a_block_that_does_not_exist_is_refused():
    vit = timm.create_model("vit_nano_reg4")
    with pytest.raises(DataError, match=r"block 9 does not exist: the model has 4, 0 to 3 or -4 to -1"):
        attention_maps(vit, torch.randn(1, 3, 32, 32), blocks=(9,))
