"""Position rules against outputs recorded from the official code, and what keeps and follows them."""

import copy
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from checkpoints import GOLDEN
from models import ONE_OF_EACH_KIND, TINY, random_bundle, randomised
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import Tensor
from transformers import AutoModel

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError
from vitreg_hub.hf_models import VitRegConfig, VitRegModel
from vitreg_hub.network.positions import TIMM_RULE, PositionRule, follow, rule_of

CASES = {
    "dinov2_vit_mlp_hub": ("vit_small_reg0", PositionRule(antialias=False, offset=0.1)),
    "dinov2_reg4": ("vit_small_reg4", TIMM_RULE),
    "deit_base": ("vit_base_reg0_plain", PositionRule(antialias=False)),
    "openclip_vision_quickgelu": ("vit_base_reg0_clip_quickgelu", PositionRule(keep_equal_count=True)),
}
RULES = [rule for _, rule in CASES.values()]
CLIP_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1": "patch_embed.proj",
    "ln_pre": "norm_pre",
}
every_case = pytest.mark.parametrize("case", CASES)


def official_embeddings(case: str) -> dict[str, Tensor]:
    """What the official checkpoint has in front of the blocks, under timm's names."""
    weights = torch.load(GOLDEN / case / "checkpoint.pth", weights_only=True)
    weights = weights.get("model", weights.get("state_dict", weights))
    names = {"register_tokens": "reg_token"}
    for key in weights:
        module, _, kind = key.removeprefix("visual.").partition(".")
        if module in CLIP_NAMES:
            names[key] = ".".join(filter(None, (CLIP_NAMES[module], kind)))
    ours = {names.get(key, key): tensor for key, tensor in weights.items()}
    wanted = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")
    return {key: tensor for key, tensor in ours.items() if key.startswith(wanted)}


def images_of(case: str) -> Iterator[tuple[str, tuple[int, int], Tensor]]:
    """Yield (name, grid, images) of every recorded size, the native one first."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    inputs = load_file(GOLDEN / case / "inputs.safetensors")
    for entry in meta["resolutions"]:
        name = "x".join(map(str, entry["size"]))
        yield name, tuple(entry["grid"]), inputs[f"image_{name}"]


def golden_bundle(case: str, *, rule: PositionRule | None = None) -> ModelBundle:
    """A bundle whose embeddings are the official ones; the blocks are random."""
    arch, own_rule = CASES[case]
    (_, _, native), *_ = images_of(case)
    weights = official_embeddings(case)
    class_position, patch_positions = weights["pos_embed"].reshape(1, -1, 32).split([1, 16], dim=1)
    weights |= {"cls_token": weights["cls_token"] + class_position, "pos_embed": patch_positions}
    model = timm.create_model(
        arch, img_size=tuple(native.shape[2:]), patch_size=native.shape[2] // 4, num_classes=0, **TINY
    )
    left = randomised(model).load_state_dict(weights, strict=False)
    assert left.unexpected_keys == []
    assert all(key.startswith(("blocks.", "norm.")) for key in left.missing_keys)
    follow(model, own_rule if rule is None else rule)
    return ModelBundle.from_timm(model, arch=arch, provenance=Provenance(origin="golden"))


def entering(model: VisionTransformer, images: Tensor) -> Tensor:
    """The tokens [B, N, D] that enter the first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def ruled_model(**timm_kwargs: Any) -> VisionTransformer:
    return golden_bundle("dinov2_vit_mlp_hub").build(dynamic_img_size=True, **timm_kwargs)


# The rule


@pytest.mark.parametrize("case", ["deit_base", "openclip_vision_quickgelu"])
def test_table_is_the_official_one(case):
    table = official_embeddings(case)["pos_embed"].reshape(1, 17, 32)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for name, grid, _ in images_of(case):
        resampled = CASES[case][1].resample(table, old=(4, 4), new=grid)
        used = expected[f"{name}.pos_embed_used"].reshape(resampled.shape)
        assert (resampled - used).abs().max() < 1e-6, name


@torch.no_grad()
@every_case
def test_tokens_are_the_official_ones_at_every_size(case, folder):
    bundle = golden_bundle(case)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    dynamic = bundle.build(dynamic_img_size=True)
    wrapped = VitRegModel.from_pretrained(bundle.save(folder))
    for name, grid, images in images_of(case):
        official = expected[f"{name}.tokens_embed"]
        tokens = entering(dynamic, images)
        assert (tokens - official).abs().max() < 1e-5, name
        assert torch.equal(entering(bundle.build(img_size=tuple(images.shape[2:])), images), tokens), name
        resized = bundle.build()
        resized.set_input_size(tuple(images.shape[2:]))
        assert torch.equal(entering(resized, images), tokens), name
        assert torch.equal(wrapped(images, output_hidden_states=True).hidden_states[0], tokens), name
        assert dynamic.patch_embed.proj(images).shape[2:] == grid


@torch.no_grad()
@every_case
def test_other_rules_give_other_tokens(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    for rule in RULES:
        model = golden_bundle(case, rule=rule).build(dynamic_img_size=True)
        worst = {
            name: (entering(model, images) - expected[f"{name}.tokens_embed"]).abs().max().item()
            for name, _, images in images_of(case)
        }
        native, *others = worst.values()
        assert native < 1e-5
        assert (max(others) > 0.1) == (rule != CASES[case][1]), (rule, worst)


@torch.no_grad()
@pytest.mark.parametrize("arch", [*ONE_OF_EACH_KIND, "vit_nano_reg2 without class token"])
def test_where_rules_agree_the_model_is_timms(arch):
    arch, _, without = arch.partition(" ")
    settings = {"class_token": False, "global_pool": "avg"} if without else ONE_OF_EACH_KIND[arch]
    bundle = random_bundle(arch, **settings)
    model = bundle.build(dynamic_img_size=True)
    ruled = copy.deepcopy(model)
    follow(ruled, PositionRule(keep_equal_count=True))  # another rule only where the counts are equal
    height, width = model.patch_embed.img_size
    patch = bundle.model_args["patch_size"]
    for size in (height, width), (height + patch, width), (height, 2 * width):
        images = torch.randn(2, 3, *size)
        assert torch.equal(ruled(images), model(images)), size
    same_count = torch.randn(2, 3, patch, patch * model.patch_embed.num_patches)
    assert not torch.equal(ruled(same_count), model(same_count))


def test_rule_keeps_the_dtype():
    table = torch.randn(1, 2 + 16, 8, dtype=torch.bfloat16)
    for rule in RULES:
        resampled = rule.resample(table, old=(4, 4), new=(3, 5))
        assert (resampled.dtype, resampled.shape) == (torch.bfloat16, (1, 2 + 15, 8))
        assert torch.equal(resampled[:, :2], table[:, :2])
        assert rule.resample(table, old=(4, 4), new=(4, 4)) is table


@pytest.mark.parametrize(
    "settings", [{"offset": -0.1}, {"offset": "0.1"}, {"antialias": 1}, {"keep_equal_count": None}]
)
def test_rule_of_another_kind_is_refused(settings):
    with pytest.raises(BundleError, match=rf"positions.{next(iter(settings))} must be .*, not "):
        PositionRule(**settings)


# Models that follow it


@torch.no_grad()
def test_features_only():
    bundle = golden_bundle("dinov2_vit_mlp_hub")
    images = torch.randn(2, 3, 84, 42)
    expected = ruled_model().forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    for change in ({"dynamic_img_size": True}, {"img_size": (84, 42)}):
        maps = bundle.build(features_only=True, out_indices=(0, 2), **change)(images)
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True)), change


def test_model_of_another_class_is_refused():
    with pytest.raises(BundleError, match="a ResNet cannot follow a position rule"):
        follow(timm.create_model("resnet10t", device="meta"), RULES[0])


def test_a_rule_can_be_taken_back():
    model, images = ruled_model(), torch.randn(1, 3, 70, 70)
    timms = golden_bundle("dinov2_vit_mlp_hub", rule=TIMM_RULE).build(dynamic_img_size=True)
    assert not torch.equal(model(images), timms(images))
    follow(model, TIMM_RULE)
    assert torch.equal(model(images), timms(images))


def _saved_and_loaded(model: VisionTransformer) -> VisionTransformer:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("case", ["dinov2_vit_mlp_hub", "openclip_vision_quickgelu"])
def test_copies_follow_it(case, copied):
    model = golden_bundle(case).build(dynamic_img_size=True)
    again = copied(model)
    _, *others = images_of(case)
    assert rule_of(again) == CASES[case][1]
    for name, _, images in others:
        assert torch.equal(again(images), model(images)), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *((case, "eager") for case in CASES if case != "dinov2_reg4"),
        pytest.param("dinov2_reg4", "eager", marks=pytest.mark.slow),
        ("dinov2_reg4", "aot_eager"),
    ],
)
def test_compile(case, backend):
    torch.compiler.reset()
    bundle = golden_bundle(case)
    for model in bundle.build(dynamic_img_size=True), VitRegModel(VitRegConfig.from_dict(bundle.to_json())).eval():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for name, _, images in images_of(case):
            expected, found = model(images), compiled(images)
            if isinstance(model, VitRegModel):
                expected, found = expected.last_hidden_state, found.last_hidden_state
            assert (found - expected).abs().max() <= (0 if backend == "eager" else 1e-5), name


FREE = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
"""Batch, height and width of the exported programs."""


@torch.no_grad()
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("case", ["dinov2_reg4", "deit_base"])
def test_export_with_free_sizes(case, start):
    model = VitRegModel(VitRegConfig.from_dict(golden_bundle(case).to_json())).eval()
    sizes = [images.repeat(3, 1, 1, 1) for _, _, images in images_of(case)]
    exported = torch.export.export(model, (), {"pixel_values": sizes[start]}, dynamic_shapes=FREE).module()
    for images in sizes:
        expected = model(images).last_hidden_state
        assert (exported(pixel_values=images).last_hidden_state - expected).abs().max() < 1e-6


# What keeps it


@torch.no_grad()
@every_case
def test_rule_goes_with_the_model(case, folder, tmp_path):
    rule = CASES[case][1]
    bundle = golden_bundle(case)
    assert bundle.positions == rule
    entry = bundle.to_json()["vitreg"]
    assert ("positions" in entry) == (rule != TIMM_RULE)
    loaded = ModelBundle.load(bundle.save(folder))
    assert loaded.positions == rule
    rebuilt = ModelBundle.from_timm(loaded.build(), arch=bundle.arch, provenance=bundle.provenance)
    assert rebuilt.positions == rule
    model = AutoModel.from_pretrained(folder)
    assert rule_of(model.timm_model) == rule
    model.save_pretrained(tmp_path / "second")
    assert ModelBundle.load(tmp_path / "second").positions == rule
    assert json.loads((tmp_path / "second" / "config.json").read_text())["vitreg"].get("positions") == entry.get(
        "positions"
    )
    *_, (_, _, images) = images_of(case)
    again = AutoModel.from_pretrained(tmp_path / "second")
    assert torch.equal(again(images).last_hidden_state, bundle.build(dynamic_img_size=True).forward_features(images))
