"""What a run starts from, and which of its weights change."""

from dataclasses import replace

import pytest
import timm
import torch
from models import random_bundle

from vitreg_hub.errors import RecipeError, UnknownArchError
from vitreg_hub.training.recipes.settings import ModelSettings
from vitreg_hub.training.run.backbone import arch_of, build_backbone, set_trainable, with_registers_of


def test_scratch_is_seeded_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first = build_backbone(ModelSettings(arch="vit_nano_reg4"), num_classes=3, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    again = build_backbone(ModelSettings(arch="vit_nano_reg4"), num_classes=3, seed=1)
    other = build_backbone(ModelSettings(arch="vit_nano_reg4"), num_classes=3, seed=2)
    assert first.training
    assert torch.equal(first.reg_token, again.reg_token)
    assert not torch.equal(first.reg_token, other.reg_token)
    assert first.head.out_features == 3


def test_settings_reach_the_network():
    settings = ModelSettings(arch="vit_nano_reg1", img_size=16, drop_path=0.3, layer_scale=0.25)
    model = build_backbone(settings, num_classes=0, seed=0)
    assert model.patch_embed.img_size == (16, 16)
    # DeiT-III and DINOv2 skip with the same probability everywhere; timm's own ramp would begin with 0
    assert [block.drop_path1.drop_prob for block in model.blocks] == [0.3] * len(model.blocks)
    assert [block.drop_path2.drop_prob for block in model.blocks] == [0.3] * len(model.blocks)
    assert (model.blocks[0].ls1.gamma == 0.25).all()


def test_start_gives_its_weights_and_keeps_its_size():
    model = build_backbone(ModelSettings(arch="vit_nano_reg4", start="vit_nano_reg4.digits"), num_classes=10, seed=0)
    published = timm.create_model("vit_nano_reg4", pretrained=True)
    for name, tensor in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("old", "new"), [(0, 4), (4, 8), (4, 1), (4, 0)])
def test_registers_are_added_or_dropped_and_nothing_else_changes(old, new):
    start = f"vit_nano_reg{4 if old else 0}.digits"
    model = build_backbone(ModelSettings(arch=f"vit_nano_reg{new}", start=start), num_classes=10, seed=0)
    source = timm.create_model(start.partition(".")[0], pretrained=True).state_dict()
    ours = model.state_dict()
    assert {name for name in source if name != "reg_token"} == {name for name in ours if name != "reg_token"}
    for name, tensor in source.items():
        if name != "reg_token":
            assert torch.equal(tensor, ours[name]), name
    kept = min(old, new)
    if new:
        assert ours["reg_token"].shape[1] == new
        if kept:
            assert torch.equal(ours["reg_token"][:, :kept], source["reg_token"][:, :kept])
        drawn = ours["reg_token"][0, kept:]
        if len(drawn):
            assert drawn.std() == pytest.approx(0.02, rel=0.3)
            assert torch.pdist(drawn).min() > 0.01  # equal ones would stay equal


def test_another_architecture_is_refused():
    with pytest.raises(RecipeError, match=r"vit_nano_reg4.digits is a vit_nano_reg4, but model.arch is vit_tiny_reg4"):
        build_backbone(ModelSettings(arch="vit_tiny_reg4", start="vit_nano_reg4.digits"), num_classes=0, seed=0)
    with pytest.raises(UnknownArchError, match="there is no folder and no architecture 'nowhere'"):
        build_backbone(ModelSettings(arch="vit_tiny_reg4", start="nowhere"), num_classes=0, seed=0)


def test_trainable_parts():
    model = timm.create_model("vit_nano_reg4", num_classes=10)
    set_trainable(model, "registers")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["reg_token"]
    model = timm.create_model("vit_nano_reg4", num_classes=10)
    set_trainable(model, "registers+norms")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norms = {f"blocks.{i}.norm{j}.{kind}" for i in range(4) for j in (1, 2) for kind in ("weight", "bias")}
    assert trained == norms | {"norm.weight", "norm.bias", "reg_token"}
    with pytest.raises(RecipeError, match="no registers"):
        set_trainable(timm.create_model("vit_nano_reg0"), "registers")


def test_bundle_of_another_register_count_is_still_a_bundle():
    bundle = with_registers_of("vit_nano_reg8", random_bundle("vit_nano_reg2"), called="start")
    bundle.require_consistent()
    assert bundle.build().num_reg_tokens == 8


def test_architecture_and_size_are_the_starts_with_other_registers_if_asked():
    start = ModelSettings(arch=None, start="vit_nano_reg4.digits")
    assert arch_of(start) == "vit_nano_reg4"
    assert arch_of(replace(start, registers=8)) == "vit_nano_reg8"
    with pytest.raises(RecipeError, match="has 3 registers: give one of"):
        arch_of(replace(start, registers=3))


OTHERS = tuple("9876543210")


@pytest.mark.parametrize(
    ("head", "names", "kept"),
    [
        ("auto", tuple("0123456789"), True),
        ("auto", None, True),
        ("auto", OTHERS, False),
        ("new", None, False),
        ("kept", OTHERS, True),
    ],
)
def test_a_head_is_kept_for_the_same_classes(head, names, kept):
    settings = ModelSettings(arch="vit_nano_reg4", start="vit_nano_reg4.digits", head=head)
    model = build_backbone(settings, num_classes=10, seed=0, label_names=names)
    before = timm.create_model("vit_nano_reg4", pretrained=True).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (kept or not name.startswith("head.")), name
    if not kept:
        assert 0.01 < model.head.weight.std() < 0.03
        with pytest.raises(RecipeError, match=r"but (model.head is new|.* has the class '0' where the data have '9')"):
            build_backbone(replace(settings, trainable="registers"), num_classes=10, seed=0, label_names=names)
