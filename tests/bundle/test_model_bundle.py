"""Bundles: the one form on disk, what breaks it, and what is built from it."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from bounds import within_bounds
from models import ONE_OF_EACH_KIND, random_bundle, randomised
from pushers import plan
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from vitreg_hub.any_vit import open_vit
from vitreg_hub.bundle.doors import DOORS, verify
from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, DataError, UnknownArchError
from vitreg_hub.files import new_folder

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def saved(folder: Path) -> Path:
    return random_bundle().save(folder)


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("arch", "overrides"), ONE_OF_EACH_KIND.items(), ids=ONE_OF_EACH_KIND)
def test_loaded_bundle_builds_the_model_that_was_saved(arch, overrides, folder):
    model = randomised(timm.create_model(arch, num_classes=7, **overrides))
    ModelBundle.from_timm(model, arch=arch, provenance=Provenance(origin="random weights")).save(folder)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.equal(ModelBundle.load(folder).build()(images), model(images))
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(plain(images), model(images))


@pytest.mark.parametrize(
    "arch",
    ["vit_nano_reg4", "vit_giant_reg2", "vit_base_reg8_clip", "vit_tiny_reg2_plain", "vit_tiny_reg0_deit_distilled"],
)
def test_all_doors_give_the_same_numbers(arch, folder):
    random_bundle(arch, **ONE_OF_EACH_KIND[arch]).save(folder)
    assert verify(folder) == dict.fromkeys(DOORS, 0.0)


def test_a_model_without_head_opens_through_all_doors(folder):
    random_bundle("vit_nano_reg1", num_classes=0).save(folder)
    assert verify(folder) == dict.fromkeys(DOORS, 0.0)


RULES_BROKEN = {
    "R1": lambda config: config.update(architecture="vit_nano_reg4"),
    "R2": lambda config: config["model_args"].pop("img_size"),
    "R3": lambda config: config["model_args"].update(num_classes=10),
    "R4": lambda config: config["pretrained_cfg"].update(arch="vit_nano_reg4"),
    "R5": lambda config: config.update(model_type="vitreg"),
}


@pytest.mark.parametrize("rule", RULES_BROKEN)
@pytest.mark.parametrize("opens", [ModelBundle.load, verify])
def test_broken_config_rule_is_named(rule, opens, saved):
    edit_config(saved, RULES_BROKEN[rule])
    with pytest.raises(BundleError, match=rf"{rule}: "):
        opens(saved)


def prefix_names(folder: Path) -> None:
    tensors = {f"timm_model.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_format(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["reg_token"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


@pytest.mark.parametrize("breaks", [prefix_names, drop_format, drop_tensor, truncate, pickle_weights, add_pickle])
@pytest.mark.parametrize("opens", [ModelBundle.load, verify])
def test_broken_weights_rule_is_named(breaks, opens, saved):
    breaks(saved)
    with pytest.raises(BundleError, match="R6: ") as caught:
        opens(saved)
    assert "\n" not in str(caught.value)


def test_what_a_trainer_writes_beside_the_weights_is_no_second_weights_file(saved):
    (saved / "training_args.bin").write_bytes(b"a pickle that is never read")
    assert ModelBundle.load(saved).arch == "vit_nano_reg4"


def model_args(**args) -> Callable[[dict], object]:
    return lambda config: config["model_args"].update(args)


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


def pushed(folder: Path) -> None:
    plan(folder, "lab/model")


TOO_MUCH = {
    "depth": (model_args(depth=10**9), "depth is 1000000000, but 500 is the most"),
    "depth of 300 digits": (model_args(depth=10**300), "depth is 10{200}.*, but 500 is the most"),
    "width": (model_args(embed_dim=10**12), "embed_dim is 1000000000000, but"),
    "heads": (model_args(num_heads=10**9), "num_heads is 1000000000, but"),
    "registers": (model_args(reg_tokens=10**9), "reg_tokens is 1000000000, but"),
    "image": (model_args(img_size=[10**9, 10**9]), "img_size is 1000000000, but"),
    "MLP": (model_args(mlp_ratio=1e300), "mlp_ratio is 1e.300, but"),
    "classes": (lambda config: config.update(num_classes=10**12), "num_classes is 1000000000000, but 1,000,000 is"),
    "crop": (lambda config: config["pretrained_cfg"].update(crop_pct=1e-300), "crop_pct must be at least 0.1"),
    "initialisation": (model_args(weight_init="x"), "weight_init must be 'skip', .* not 'x'"),
    "nested": (lambda config: config["vitreg"].update(more=nested(400)), "more is nested deeper than 60"),
    "half a character": (
        lambda config: config.update(label_names=["\ud800"] * 10),
        "label_names|the file cannot be read",
    ),
}


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize("opens", [ModelBundle.load, describe, open_vit, AutoModel.from_pretrained, verify, pushed])
@pytest.mark.parametrize("what", TOO_MUCH)
def test_small_config_asks_for_no_unbounded_work(what, opens, saved):
    change, says = TOO_MUCH[what]
    edit_config(saved, change)
    with within_bounds(), pytest.raises(BundleError, match=says) as caught:
        opens(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, '{"vitreg":' * 10_000, "\ufffe", '{"vitreg": NaN'])
@pytest.mark.parametrize("opens", [ModelBundle.load, describe, open_vit, verify, pushed])
def test_config_that_cannot_be_read(text, opens, saved):
    (saved / "config.json").write_text(text)
    with pytest.raises(BundleError) as caught:
        opens(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opens", [ModelBundle.load, describe, open_vit])
def test_config_that_is_no_file_or_huge(opens, saved):
    config = saved / "config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(BundleError):
        opens(saved)
    config.unlink()
    with config.open("wb") as file:
        file.truncate(2**35)  # takes no room
    with pytest.raises(BundleError, match=r"config\.json has 32,768 MB, more than the 8"):
        opens(saved)


@pytest.mark.parametrize("opens", [ModelBundle.load, describe])
def test_keys_that_nothing_reads_are_named(opens, saved, caplog):
    opens(saved)
    edit_config(saved, lambda config: config.update(initializer_range=0.1, apply_layernorm=False))  # transformers'
    opens(saved)
    assert not caplog.text
    edit_config(saved, lambda config: config.update(mean=[0.5] * 3, crop_pct=0.9))
    opens(saved)
    assert "config.json holds crop_pct, mean, which nothing reads" in caplog.text


STRANGE_CONFIGS = [
    (lambda config: config.update(model_args=[1]), r"model_args must be an object, not \[1\]"),
    (lambda config: config.update(pretrained_cfg="x"), "pretrained_cfg must be an object, not 'x'"),
    (lambda config: config.update(num_classes="10"), "num_classes must be a whole number, not '10'"),
    (lambda config: config.update(num_classes=None), "num_classes must be a whole number, not None"),
    (lambda config: config.update(label_names=["a"]), r"label_names must be a list of 10 names, not \['a'\]"),
    (lambda config: config.update(label_names="0123456789"), "label_names must be a list, not '0123456789'"),
    (lambda config: config["vitreg"].update(arch=3), "no architecture 3"),
    (lambda config: config["vitreg"].update(arch=["x"]), "no architecture"),
    (lambda config: config["vitreg"].update(provenance=[]), r"provenance must be an object, not \[\]"),
    (lambda config: config["vitreg"].pop("provenance"), "vitreg.provenance is missing"),
    (lambda config: config["vitreg"]["provenance"].pop("origin"), "vitreg.provenance.origin is missing"),
    (lambda config: config["vitreg"]["provenance"].update(more=1), r"provenance holds \['more'\]; a newer vitreg_hub"),
    (
        lambda config: config["vitreg"]["provenance"].update(metrics={"accuracy": "high"}),
        "metrics.accuracy must be a number, not 'high'",
    ),
    (lambda config: config["vitreg"]["provenance"].update(metrics=[1]), r"metrics must be an object, not \[1\]"),
    (lambda config: config["vitreg"]["provenance"].update(origin=None), "provenance.origin must be text, not None"),
    (lambda config: config["vitreg"]["provenance"].update(command=["a"]), r"command must be text, not \['a'\]"),
    (lambda config: config["vitreg"]["provenance"].update(license={}), "license must be text, not {}"),
    (lambda config: config["vitreg"]["provenance"].update(seconds="1"), "seconds must be a number, not '1'"),
    (
        lambda config: config["vitreg"]["provenance"].update(seconds=-1),
        "seconds must be at least 0, not -1",
    ),
    (
        lambda config: config["vitreg"].update(provenance={"origin": "x", "settings": 3}),
        "settings must be an object, not",
    ),
    (lambda config: config["vitreg"]["provenance"].update(versions={"a": 1}), "versions.a must be text, not 1"),
    (lambda config: config["vitreg"].update(more=1), r"vitreg holds \['more'\]; a newer vitreg_hub"),
    (lambda config: config["vitreg"].update(positions=[]), r"vitreg.positions must be an object, not \[\]"),
    (lambda config: config["vitreg"].update(positions={"more": 1}), r"vitreg.positions holds \['more'\]; a newer"),
    (lambda config: config["vitreg"].update(positions={"antialias": 0}), "antialias must be true or false, not 0"),
    (lambda config: config["vitreg"].update(positions={"offset": float("nan")}), "offset must be a number .*, not nan"),
    (lambda config: config["vitreg"].update(positions={"offset": True}), "offset must be a number, not True"),
    (lambda config: config["vitreg"].update(positions={"offset": 1}), "offset must be a number .*, not 1"),
    (lambda config: config["vitreg"].update(residual_scale=3.0), "residual_scale must be a positive power of two, not"),
    (lambda config: config["vitreg"].update(residual_scale=-2.0), "must be a positive power of two, not -2.0"),
    (lambda config: config["vitreg"].update(residual_scale=True), "must be a positive power of two, not True"),
    (lambda config: config["vitreg"].update(residual_scale=10**400), "must be a positive power of two, not 100"),
    (lambda config: config["vitreg"].update(residual_scale=2), "residual_scale needs a network without norm_pre and L"),
    (lambda config: config["model_args"].update(reg_tokens="4"), "reg_tokens must be a whole number, not '4'"),
    (lambda config: config["model_args"].update(reg_tokens=-4), "reg_tokens must be at least 0, not -4"),
    (lambda config: config["model_args"].update(patch_size=0), "patch_size must be greater than 0, not 0"),
    (lambda config: config["model_args"].update(num_heads=0), "num_heads must be greater than 0, not 0"),
    (lambda config: config["model_args"].update(img_size="32"), "img_size must be a list, not '32'"),
    (lambda config: config["model_args"].update(img_size=[32]), "img_size.1 is missing"),
    (lambda config: config["model_args"].update(act_layer="nope"), "timm cannot build the model .*nope"),
    (lambda config: config["pretrained_cfg"].update(mean=0.5), "mean must be a list, not 0.5"),
    (lambda config: config["pretrained_cfg"].update(input_size=[1, 32, 32]), "but model_args say"),
    (lambda config: config["pretrained_cfg"].update(input_size=32), "input_size must be a list, not 32"),
]


@pytest.mark.parametrize(("change", "says"), STRANGE_CONFIGS)
def test_strange_config_is_one_sentence(change, says, saved):
    edit_config(saved, change)
    with pytest.raises(BundleError, match=says) as caught:
        ModelBundle.load(saved)
    assert "\n" not in str(caught.value)


def test_contradicting_number_of_registers(saved):
    edit_config(saved, lambda config: config["model_args"].update(reg_tokens=8))
    with pytest.raises(BundleError, match=r"vit_nano_reg4 has 4 registers, but model_args.reg_tokens is 8"):
        ModelBundle.load(saved)


def test_number_of_registers_that_no_row_has(folder):
    bundle = random_bundle("vit_nano_reg4", reg_tokens=6)
    images = torch.randn(2, 3, 32, 32)
    loaded = ModelBundle.load(bundle.save(folder))
    assert (loaded.arch, loaded.model_args["reg_tokens"]) == ("vit_nano_reg4", 6)
    assert torch.equal(loaded.build()(images), bundle.build()(images))
    assert loaded.build().num_reg_tokens == 6
    assert verify(folder) == dict.fromkeys(DOORS, 0.0)
    with pytest.raises(BundleError, match=r"vit_nano_reg2 has 2 registers, but .* is 6: that is vit_nano_reg4$"):
        random_bundle("vit_nano_reg2", reg_tokens=6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reg_tokens": 1}, "is 1: there is no room for registers"),
        ({"no_embed_class": True}, "both tokens have positions"),
    ],
)
def test_distilled_bundle_without_room(change, says, folder):
    random_bundle(arch := "vit_tiny_reg0_deit_distilled", **ONE_OF_EACH_KIND[arch]).save(folder)
    edit_config(folder, lambda config: config["model_args"].update(change))
    with pytest.raises(BundleError, match=says):
        ModelBundle.load(folder)


def test_shape_that_contradicts_the_config(saved):
    edit_config(saved, lambda config: config["model_args"].update(embed_dim=64))
    with pytest.raises(BundleError, match=r"has shape \[128\], but model_args say \[64\]"):
        ModelBundle.load(saved)


def test_all_problems_are_reported_together(saved):
    edit_config(saved, RULES_BROKEN["R1"])
    edit_config(saved, RULES_BROKEN["R5"])
    drop_format(saved)
    with pytest.raises(BundleError, match=r"R1: .*R5: .*R6: "):
        ModelBundle.load(saved)


def test_what_is_no_bundle_says_so(tmp_path):
    with pytest.raises(BundleError, match=r"has no config\.json"):
        ModelBundle.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        ModelBundle.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch14_dinov2"}')
    with pytest.raises(BundleError, match="has no 'vitreg' entry"):
        ModelBundle.load(tmp_path)
    with pytest.raises(UnknownArchError, match=r"there is no folder and no architecture '.*/nothing'"):
        ModelBundle.load(tmp_path / "nothing")
    with pytest.raises(UnknownArchError, match="vit_nano_reg8 has no weights"):
        ModelBundle.load("vit_nano_reg8")
    with pytest.raises(UnknownArchError, match="vit_nano_reg4 has no weights 'nonsense'; it has digits"):
        ModelBundle.load("vit_nano_reg4.nonsense")


def test_save_refuses_an_existing_folder_and_leaves_it_alone(saved):
    before = (saved / "config.json").read_bytes()
    with pytest.raises(BundleError, match="exists: choose another folder"):
        random_bundle("vit_nano_reg1").save(saved)
    assert (saved / "config.json").read_bytes() == before


def test_failed_write_leaves_nothing(tmp_path):
    def write_half(target: Path) -> None:
        with new_folder(target) as staging:
            (staging / "config.json").write_text("{}")
            raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(BundleError, match=r"cannot write .*target: disk full"):
        write_half(tmp_path / "new" / "target")
    assert list(tmp_path.iterdir()) == []


def test_one_form_on_disk(saved, tmp_path):
    again = ModelBundle.load(saved).save(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()


def test_built_models_share_no_memory(saved):
    for bundle in (ModelBundle.load(saved), random_bundle()):
        first, second = bundle.build(), bundle.build()
        with torch.no_grad():
            first.cls_token.add_(1.0)
        assert torch.equal(second.cls_token, bundle.state_dict["cls_token"])
        assert not torch.equal(first.cls_token, second.cls_token)
    assert torch.equal(ModelBundle.load(saved).build().cls_token, second.cls_token)


def test_build_draws_no_random_numbers(saved):
    bundle = ModelBundle.load(saved)
    before = torch.get_rng_state()
    bundle.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_build_adapts_as_timm_does(saved):
    bundle = ModelBundle.load(saved)
    for change in ({"img_size": 48}, {"img_size": (32, 64)}, {"in_chans": 1}, {"dynamic_img_size": True}):
        ours = bundle.build(**change)
        theirs = timm.create_model(f"local-dir:{saved}", pretrained=True, **change).eval()
        images = torch.randn(2, theirs.in_chans, *theirs.patch_embed.img_size)
        assert torch.equal(ours(images), theirs(images)), change
    images = torch.randn(1, 3, 32, 32)
    ours = bundle.build(features_only=True, out_indices=(1, 3))
    theirs = timm.create_model(f"local-dir:{saved}", pretrained=True, features_only=True, out_indices=(1, 3)).eval()
    assert all(torch.equal(a, b) for a, b in zip(ours(images), theirs(images), strict=True))


@pytest.mark.parametrize("old", [1, 2, 3, 4, 6, 10, 13])
def test_any_number_of_channels_becomes_any_other(old, folder):
    """The sum over channels for one, else their cycle, scaled so that the response to a grey image keeps its size."""
    bundle = random_bundle(in_chans=old)
    bundle.save(folder)
    stem = bundle.state_dict["patch_embed.proj.weight"]
    for new in 1, 2, 3, 4, 6, 10, 13:
        cycle = stem[:, [i % old for i in range(new)]] * (old / new)
        wanted = stem.sum(dim=1, keepdim=True) if new == 1 != old else cycle
        built = [bundle.build(in_chans=new), timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=new)]
        built.append(AutoModel.from_pretrained(folder, num_channels=new).timm_model)
        for network in built:
            assert torch.allclose(network.patch_embed.proj.weight, wanted)


def test_build_with_two_new_heads():
    arch = "vit_tiny_reg0_deit_distilled"
    bundle = random_bundle(arch, **ONE_OF_EACH_KIND[arch])
    model, images = bundle.build(num_classes=300), torch.randn(2, 3, 48, 64)
    assert model(images).shape == (2, 300)
    for head in model.head, model.head_dist:
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.bias.any()
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    assert torch.equal(model.forward_features(images), bundle.build().forward_features(images))


def test_build_with_a_new_head(saved):
    bundle = ModelBundle.load(saved)
    model = bundle.build(num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 3)
    wide = bundle.build(num_classes=1000).head
    theirs = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=1000).head
    assert wide.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.02)
    assert not wide.bias.any()
    assert not theirs.bias.any()
    assert torch.equal(model.forward_features(images), bundle.build().forward_features(images))
    assert bundle.build(num_classes=0)(images).shape == (2, 128)


def test_half_precision_weights_open_in_float32_through_all_doors(folder):
    model = randomised(timm.create_model("vit_nano_reg4", num_classes=10)).to(torch.bfloat16)
    ModelBundle.from_timm(model, arch="vit_nano_reg4", provenance=Provenance(origin="random weights")).save(folder)
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in ModelBundle.load(folder).build().parameters()} == {torch.float32}
    assert verify(folder) == dict.fromkeys(DOORS, 0.0)


def test_replaced_weights_are_the_ones_that_are_built(saved):
    bundle = ModelBundle.load(saved)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in bundle.state_dict.items()}
    assert not any(p.any() for p in dataclasses.replace(bundle, state_dict=zeros).build().parameters())


def test_loaded_bundle_outlives_its_folder(saved):
    bundle = ModelBundle.load(saved)
    expected = bundle.build().cls_token
    shutil.rmtree(saved)
    assert torch.equal(bundle.build().cls_token, expected)


@pytest.mark.parametrize("name", ["resnet10t", "vit_nano_reg8"])
def test_model_of_another_architecture_is_refused(name):
    with pytest.raises(BundleError, match="this is not a bundle of vit_nano_reg4: "):
        ModelBundle.from_timm(timm.create_model(name), arch="vit_nano_reg4", provenance=Provenance(origin="x"))


def test_build_takes_dtype(saved):
    model = ModelBundle.load(saved).build(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(
    "change", [{"reg_tokens": 8}, {"reg_tokens": 0}, {"depth": 6}, {"depth": 2}, {"embed_dim": 64}, {"mlp_ratio": 2}]
)
def test_build_refuses_weights_that_do_not_fit(change, saved):
    with pytest.raises(BundleError, match="vit_nano_reg4: the weights do not fit") as caught:
        ModelBundle.load(saved).build(**change)
    assert "\n" not in str(caught.value)


def test_image_that_the_patch_does_not_divide(saved):
    with pytest.raises(DataError, match="30x30 pixels does not divide into patches of 4x4: "):
        ModelBundle.load(saved).build(img_size=30)
    with pytest.raises(DataError, match="225x225 pixels does not divide into patches of 14x14: "):
        timm.create_model("vit_small_reg4", img_size=225)
    assert timm.create_model("vit_nano_reg4", img_size=(32, 24), patch_size=(4, 8)).patch_embed.grid_size == (8, 3)


def test_a_way_to_draw_weights_that_timm_does_not_know(saved):
    file = saved / "config.json"
    config = json.loads(file.read_text())
    config["model_args"]["weight_init"] = "x"
    file.write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"model_args\.weight_init must be 'skip', .* not 'x'"):
        ModelBundle.load(saved)
