"""The table and its timm models, measured against timm's own DINOv2, DeiT III and CLIP networks."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import GluMlp, LayerScale
from timm.models import FeatureInfo, VisionTransformer, get_pretrained_cfg
from torch import Tensor, nn

from vitreg_hub import arch, timm_models
from vitreg_hub.arch import ARCHS, get_arch
from vitreg_hub.errors import DataError, UnknownArchError, VitregError

SAME_IN_TIMM = {
    **{f"vit_{size}_reg4": f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant")},
    **{f"vit_{size}_reg0": f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")},
    **{f"vit_{size}_reg0_deit3": f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")},
    "vit_huge_reg0_deit3": "deit3_huge_patch14_224",
    "vit_base_reg0_clip": "vit_base_patch16_clip_224",
    "vit_large_reg0_clip": "vit_large_patch14_clip_224",
    "vit_huge_reg0_clip": "vit_huge_patch14_clip_224",
    "vit_giant_reg0_clip": "vit_giant_patch14_clip_224",
    "vit_base_reg0_clip_quickgelu": "vit_base_patch16_clip_quickgelu_224",
    **{f"vit_{size}_reg0_plain": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")},
    "vit_large_reg0_plain": "vit_large_patch16_224",
    "vit_huge_reg0_plain": "vit_huge_patch14_224",
    **{f"vit_{s}_reg0_deit_distilled": f"deit_{s}_distilled_patch16_224" for s in ("tiny", "small", "base")},
    "vit_large_reg0_clip_quickgelu": "vit_large_patch14_clip_quickgelu_224",
    "vit_huge_reg0_clip_quickgelu": "vit_huge_patch14_clip_quickgelu_224",
}
"""Our name: timm's name of the same network."""

NORM_AND_ACTIVATION = {
    "dinov2": (1e-6, "GELU"),
    "deit3": (1e-6, "GELU"),
    "clip": (1e-5, "GELU"),
    "clip_quickgelu": (1e-5, "QuickGELU"),
    "plain": (1e-6, "GELU"),
    "deit_distilled": (1e-6, "GELU"),
}

every_arch = pytest.mark.parametrize("name", ARCHS)
every_twin = pytest.mark.parametrize(("name", "timm_name"), SAME_IN_TIMM.items())


@functools.cache
def on_meta(name: str) -> VisionTransformer:
    return timm.create_model(name, device="meta", num_classes=0)


def nano(**options: Any) -> VisionTransformer:
    return timm.create_model("vit_nano_reg2", **options).eval()


def python(code: str, *arguments: str) -> None:
    """Run code in a fresh interpreter, which must succeed and say nothing."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# The table


def test_every_row_is_in_timm():
    assert ARCHS.keys() <= set(timm.list_models("vit_*_reg*"))
    assert set(timm.list_models(module="timm_models")) == ARCHS.keys()
    rows = {(spec.family, spec.size) for spec in ARCHS.values()}
    combinations = (c for c in itertools.product(rows, (0, 1, 2, 4, 8, 16)) if c[0][0] != "deit_distilled" or not c[1])
    assert len(ARCHS) == 147
    assert {((s.family, s.size), s.num_registers) for s in ARCHS.values()} == set(combinations)


@every_arch
def test_numbers_of_the_table_are_those_of_the_network(name: str):
    spec, model = ARCHS[name], on_meta(name)
    assert spec.num_params == sum(p.numel() for p in model.parameters())
    assert spec.num_patches == model.patch_embed.num_patches
    class_tokens = 2 if spec.family == "deit_distilled" else 1
    assert (spec.num_registers, spec.num_registers + class_tokens) == (model.num_reg_tokens, model.num_prefix_tokens)
    assert (spec.embed_dim, spec.depth) == (model.embed_dim, len(model.blocks))
    assert {block.attn.num_heads for block in model.blocks} == {spec.num_heads}
    assert model.pretrained_cfg["architecture"] == name
    assert tuple(model.pretrained_cfg["input_size"]) == (3, spec.img_size, spec.img_size)


@every_arch
def test_model_args_are_json(name: str):
    args = ARCHS[name].model_args()
    assert json.loads(json.dumps(args)) == args


@pytest.mark.parametrize("name", ["vit_smal_reg4", "vit_small_reg3", "timm/vit_small_reg4"])
def test_an_unknown_name_gets_near_ones(name: str):
    with pytest.raises(UnknownArchError, match=r"closest: .*vit_small_reg4\b") as caught:
        get_arch(name)
    assert isinstance(caught.value, VitregError)
    assert isinstance(caught.value, ValueError)


def test_a_name_like_no_other_gets_none():
    with pytest.raises(UnknownArchError, match="closest: none"):
        get_arch("resnet50")


@pytest.mark.parametrize(("registers", "name"), {0: 0, 3: 2, 4: 4, 6: 4, 15: 8, 16: 16, 99: 16}.items())
def test_row_of_a_number_of_registers(registers: int, name: int):
    assert arch.row("plain", "base", registers).name == f"vit_base_reg{name}_plain"


@pytest.mark.parametrize(
    "wanted", [("plain", "base", -1), ("plain", "giant", 4), ("swin", "base", 4), ("deit_distilled", "base", 1)]
)
def test_row_that_there_is_not(wanted: tuple[str, str, int]):
    assert arch.row("deit_distilled", "base", 0).name == "vit_base_reg0_deit_distilled"
    with pytest.raises(UnknownArchError, match=f"^no architecture of family '{wanted[0]}'.* takes {wanted[2]} reg"):
        arch.row(*wanted)


def test_the_table_needs_no_torch():
    code = """if True:
        import sys, types
        package = sys.modules["vitreg_hub"] = types.ModuleType("vitreg_hub")
        package.__path__ = sys.argv[1:]  # without the package's __init__
        from vitreg_hub.arch import ARCHS
        assert ARCHS and "torch" not in sys.modules and "timm" not in sys.modules
    """
    python(code, str(Path(arch.__file__).parent))


# The networks


@every_twin
def test_modules_and_shapes_are_those_of_timm(name: str, timm_name: str):
    ours, theirs = on_meta(name), on_meta(timm_name)
    assert str(ours) == str(theirs)  # shows the classes, epsilons and widths of all modules
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    assert ours.global_pool == theirs.global_pool
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    if ours.no_embed_class and not theirs.no_embed_class:  # our class token has no position
        shapes["pos_embed"] = (1, theirs.patch_embed.num_patches, theirs.embed_dim)
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes


def layer_scales(model: VisionTransformer) -> set[float]:
    return {module.gamma[0].item() for module in model.modules() if isinstance(module, LayerScale)}


@every_twin
def test_the_same_weights_give_the_same_features(name: str, timm_name: str):
    sizes = dict(depth=2, embed_dim=96, num_heads=4, num_classes=0, img_size=4 * get_arch(name).patch_size)
    ours, theirs = (timm.create_model(n, **sizes).eval() for n in (name, timm_name))
    assert layer_scales(ours) == layer_scales(theirs)
    for parameter in theirs.parameters():  # a LayerScale of 1e-5 would hide the blocks
        nn.init.normal_(parameter, std=0.3)
    weights = theirs.state_dict()
    if ours.no_embed_class and not theirs.no_embed_class:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    ours.load_state_dict(weights)
    images = torch.randn(2, 3, *ours.patch_embed.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images))
        torch.testing.assert_close(ours(images), theirs(images))


@every_arch
def test_family_facts(name: str):
    spec, model = ARCHS[name], on_meta(name)
    eps, activation = NORM_AND_ACTIVATION[spec.family]
    if (spec.family, spec.size) == ("dinov2", "giant"):
        activation = "SiLU"
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {eps}
    assert spec.lineage.norm_eps == eps
    assert {type(block.mlp.act).__name__ for block in model.blocks} == {activation}
    gates = {isinstance(block.mlp, GluMlp) and not block.mlp.gate_last for block in model.blocks}
    assert gates == {activation == "SiLU"}
    assert (model.patch_embed.proj.bias is None) == spec.family.startswith("clip")
    assert isinstance(model.norm_pre, nn.LayerNorm) == spec.family.startswith("clip")


@pytest.mark.parametrize(
    ("family", "timm_name"),
    {
        "dinov2": "vit_base_patch14_reg4_dinov2.lvd142m",
        "deit3": "deit3_base_patch16_224.fb_in1k",
        "clip": "vit_base_patch16_clip_224.laion2b",
        "clip_quickgelu": "vit_base_patch16_clip_quickgelu_224.openai",
        "plain": "deit_base_patch16_224.fb_in1k",
        "deit_distilled": "deit_base_distilled_patch16_224.fb_in1k",
    }.items(),
)
def test_images_are_those_of_the_lineage(family: str, timm_name: str):
    theirs = get_pretrained_cfg(timm_name)
    for name in (name for name, spec in ARCHS.items() if spec.family == family and spec.size == "base"):
        ours = get_pretrained_cfg(name)
        for fact in ("input_size", "fixed_input_size", "mean", "std", "interpolation", "first_conv", "classifier"):
            assert getattr(ours, fact) == getattr(theirs, fact), fact


# Options of create_model


@pytest.mark.parametrize(("img_size", "grid"), [(24, (6, 6)), ((16, 40), (4, 10))])
def test_img_size(img_size: int | tuple[int, int], grid: tuple[int, int]):
    model = nano(img_size=img_size)
    assert model.patch_embed.grid_size == grid
    assert model.pos_embed.shape == (1, grid[0] * grid[1], 128)
    assert model.forward_features(torch.randn(1, 3, 4 * grid[0], 4 * grid[1])).shape == (1, 3 + grid[0] * grid[1], 128)


@pytest.mark.parametrize("img_size", [30, (32, 30)])
def test_img_size_that_the_patches_do_not_divide(img_size: int | tuple[int, int]):
    with pytest.raises(DataError, match="does not divide into patches of 4"):
        nano(img_size=img_size)
    with pytest.raises(DataError, match="does not divide into patches of 4"):
        nano(img_size=img_size, dynamic_img_pad=True)
    padding = nano(img_size=img_size, dynamic_img_pad=True, dynamic_img_size=True)
    assert padding.forward_features(torch.randn(1, 3, 30, 32)).shape == (1, 3 + 8 * 8, 128)


def test_dynamic_img_size():
    rectangle = torch.randn(1, 3, 32, 48)
    with pytest.raises(AssertionError, match="width"):
        nano()(rectangle)
    assert nano(dynamic_img_size=True).forward_features(rectangle).shape == (1, 3 + 8 * 12, 128)


def test_in_chans():
    model = nano(in_chans=1)
    assert model.patch_embed.proj.weight.shape == (128, 1, 4, 4)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 128)


def test_num_classes():
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(nano().head, nn.Identity)
    assert nano(num_classes=7)(images).shape == (2, 7)
    for name in ("vit_small_reg4_deit3", "vit_small_reg4_plain", "vit_small_reg0_deit_distilled"):
        assert timm.create_model(name, device="meta").num_classes == 1000


def test_average_pooling_leaves_out_class_token_and_registers():
    model = nano(global_pool="avg", num_classes=7)
    images = torch.randn(2, 3, 32, 32)
    patches = model.forward_features(images)[:, 3:]
    assert patches.shape[1] == 8 * 8
    torch.testing.assert_close(model(images), model.head(model.fc_norm(patches.mean(dim=1))))


def test_features_only():
    model = nano(features_only=True, out_indices=(0, 3))
    images = torch.randn(2, 3, 32, 32)
    info: FeatureInfo = model.feature_info
    assert (info.channels(), info.reduction()) == ([128, 128], [4, 4])
    maps = model(images)
    assert [tuple(features.shape) for features in maps] == [(2, 128, 8, 8)] * 2
    tokens = model.model.forward_features(images)[:, 3:]  # without the norm, which the wrapper has pruned
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens)
    assert distinct(model.model.reg_token[0])


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_reg_tokens_can_be_overridden(count: int):
    model = nano(reg_tokens=count)
    assert model.num_prefix_tokens == 1 + count
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 1 + count + 64, 128)
    if count == 0:
        assert model.reg_token is None
    else:
        assert model.reg_token.shape == (1, count, 128)
        assert distinct(model.reg_token[0])


def test_registers_for_which_there_is_no_room():
    with pytest.raises(UnknownArchError, match="takes 2 registers"):
        timm.create_model("vit_tiny_reg0_deit_distilled", reg_tokens=2, device="meta")


# Registers


def distinct(registers: Tensor) -> bool:
    """Whether registers are as far from each other and from zero as draws from N(0, 0.02^2) are."""
    points = torch.cat([registers, torch.zeros_like(registers[:1])])
    return torch.pdist(points).min().item() > 0.5 * 0.02 * registers.shape[1] ** 0.5


@pytest.mark.parametrize("name", [f"vit_nano_reg{n}" for n in (1, 2, 4, 8, 16)] + ["vit_small_reg4_deit3"])
def test_new_registers_differ(name: str):
    registers = timm.create_model(name).reg_token[0]
    assert len(registers) == ARCHS[name].num_registers
    assert registers.std().item() == pytest.approx(0.02, rel=0.25)
    assert registers.mean().item() == pytest.approx(0, abs=0.01)
    assert distinct(registers)


@pytest.mark.parametrize("zeros", [False, True])
def test_registers_that_differ_learn_to_differ(zeros: bool):
    model = timm.create_model("vit_nano_reg4", num_classes=5).double()
    if zeros:  # what `distinct` is for: they get equal gradients for ever
        nn.init.zeros_(model.reg_token)
    start = model.reg_token.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.arange(8) % 5
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    registers = model.reg_token.detach()[0]
    assert (registers - start).abs().max() > 1e-3
    if zeros:
        torch.testing.assert_close(registers, registers[:1].expand_as(registers), rtol=0, atol=1e-9)
    else:
        assert distinct(registers)


def test_pretrained_registers_are_kept(tmp_path: Path):
    weights = nano().state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    loaded = nano(pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in weights.items())


# The registry


@pytest.mark.parametrize("size", ["small", "base", "large", "giant"])
def test_timms_weights_have_a_tag(size: str):
    name, tag = f"vit_{size}_reg4", "dinov2_lvd142m"
    assert f"{name}.{tag}" in timm.list_pretrained()
    for cfg in (get_pretrained_cfg(name), get_pretrained_cfg(f"{name}.{tag}")):
        assert (cfg.architecture, cfg.tag) == (name, tag)
        assert cfg.hf_hub_id == f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m"
    model = timm.create_model(f"{name}.{tag}", depth=1, device="meta")
    assert model.pretrained_cfg["hf_hub_id"] == f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m"


def test_no_weights_no_tag():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for vit_nano_reg2"):
        nano(pretrained=True)
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(lvd142m\) for vit_nano_reg2"):
        timm.create_model("vit_nano_reg2.lvd142m")


def test_registering_again_adds_nothing():
    assert timm_models.register() == []


def test_import_is_silent_and_can_be_repeated():
    python("import importlib, vitreg_hub; importlib.reload(vitreg_hub)")


def test_import_overwrites_nothing():
    code = """if True:
        import timm
        from timm.models import get_pretrained_cfg, model_entrypoint, register_model

        @register_model
        def vit_nano_reg2(pretrained=False, **kwargs):
            return timm.create_model("test_vit", **kwargs)

        def registry():
            cfgs = {name: get_pretrained_cfg(name) for name in timm.list_models(include_tags=True)}
            return {name: model_entrypoint(name) for name in timm.list_models()}, cfgs

        entrypoints, cfgs = registry()
        import vitreg_hub
        from vitreg_hub.arch import ARCHS
        new_entrypoints, new_cfgs = registry()
        assert new_entrypoints["vit_nano_reg2"] is vit_nano_reg2
        assert new_entrypoints.items() >= entrypoints.items()
        assert new_entrypoints.keys() - entrypoints.keys() == ARCHS.keys() - {"vit_nano_reg2"}
        assert {name: new_cfgs[name] for name in cfgs} == cfgs
    """
    python(code)
