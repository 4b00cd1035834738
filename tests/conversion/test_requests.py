"""Requests, configs and targets that `convert` refuses, with one sentence and without a trace on disk."""

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import DINOV2, GOLDEN, OPENCLIP_CONFIG, Payload, convert, random_tensors, tensors_of, vit
from safetensors.torch import load_file, save_file

from vitreg_hub import conversion
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import BundleError, ConversionError, UnknownArchError, VitregError

# Requests


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("vit_small_reg0_deit3", "family dinov2, not deit3"),
        ("vit_small_reg0", "width 32, not 384, depth 3, not 12, heads 2, not 6"),
        ("vit_small_reg4", "registers 0, not 4; new registers come with --registers"),
        ("vit_nano_reg0", "patch size (14, 14), not (4, 4)"),
        ("vit_giant_reg0", "SwiGLU False, not True"),
    ],
)
def test_wrong_architecture(arch, says, saved, refused):
    text = refused(saved(tensors_of("dinov2_vit_mlp_hub")), arch=arch, num_heads=2)
    assert f"is not {arch}: it has" in text
    assert says in text


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(arch="vit_smal_reg0"), UnknownArchError, "closest: vit_small_reg0"),
        (dict(format="dinov4"), ConversionError, "no format 'dinov4'; closest: dinov2; there are openclip-timm"),
        (dict(format="deit3"), ConversionError, "does not fit the format deit3 .* names are nearest to dinov2's"),
        (dict(num_heads=None), ConversionError, r"has width 32, .* give --num-heads \(a number that divides 32\)"),
        (dict(num_heads=5), ConversionError, "does not divide into 5 heads"),
        (dict(num_heads=-2), ConversionError, "does not divide into -2 heads"),
        (dict(act="relu"), ConversionError, "give --act gelu or quick_gelu"),
        (dict(act="quick_gelu"), ConversionError, "has the activation gelu, not quick_gelu: leave --act out"),
        (dict(num_registers=3), ConversionError, "cannot get 3 registers: the table has 0, 1, 2, 4, 8, 16"),
        (dict(num_registers=-1), ConversionError, "cannot get -1 registers"),
        (dict(img_size=57), ConversionError, "does not divide into patches of 14x14"),
        (dict(img_size=0), ConversionError, "img_size.0 must be greater than 0, not 0"),
        (dict(img_size=-14), ConversionError, "img_size.0 must be greater than 0, not -14"),
        (dict(img_size=14 * 10**6), ConversionError, "cannot get positions for an image of"),
    ],
    ids=str,
)
def test_wrong_requests(options, error, says, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    assert re.search(says, refused(source, error, **DINOV2 | options))


@pytest.mark.parametrize("wanted", [0, 1, 8])
def test_registers_cannot_be_replaced(wanted, refused):
    source = GOLDEN / "dinov2_reg4/checkpoint.pth"
    assert f"has 4 registers already; they can be kept, but not replaced by {wanted}" in refused(
        source, num_heads=4, num_registers=wanted
    )


# What no tensor tells


def wide(tensors: dict[str, torch.Tensor], old: int, new: int) -> dict[str, torch.Tensor]:
    """Tensors of the same names for a width that is `new` / `old` times larger."""
    return {n: torch.zeros([s // old * new if s % old == 0 else s for s in t.shape]) for n, t in tensors.items()}


def test_bare_openclip_needs_the_activation(saved, refused):
    says = refused(saved(tensors_of("openclip_vision_gelu")), num_heads=2)
    assert "no tensor tells" in says
    assert "--act gelu" in says
    assert "--act quick_gelu" in says


def test_width_1280_needs_the_heads(saved, refused):
    clip = wide(tensors_of("openclip_vision_gelu"), 32, 1280)
    assert "--num-heads (16 or 20)" in refused(saved(clip, "weights.safetensors"), act="gelu")
    plain = vit(depth=1, dim=1280, **{"head.weight": (2, 1280), "head.bias": (2,)})
    assert "--num-heads (16 or 20)" in refused(saved(plain, "weights.safetensors"))


def test_headless_plain_layout_needs_the_format(saved, refused):
    assert "say which with --format timm, deit or dino" in refused(saved(vit()), num_heads=2)
    scaled = vit() | random_tensors({f"blocks.{i}.ls{j}.gamma": (32,) for i in (0, 1) for j in (1, 2)})
    assert "say which with --format timm or dinov2" in refused(saved(scaled), num_heads=2)


@pytest.mark.parametrize("case", ["hf_vit", "hf_deit", "hf_clip_vision"])
def test_transformers_weights_need_their_config(case, tmp_path, refused):
    alone = shutil.copy(GOLDEN / case / "model/model.safetensors", tmp_path / "alone.safetensors")
    assert "stand in config.json: put that beside the weights, or give the folder" in refused(alone)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("hf_vit", {"hidden_size": 64}),
        ("hf_vit", {"num_hidden_layers": 2}),
        ("hf_vit", {"patch_size": 8}),
        ("hf_vit", {"num_channels": 1}),
        ("hf_vit", {"intermediate_size": 64}),
        ("hf_vit", {"image_size": 224}),
        ("hf_dinov2", {"use_swiglu_ffn": True}),
        ("hf_dinov2_reg", {"num_register_tokens": 8}),
    ],
    ids=str,
)
def test_config_that_contradicts_the_tensors(case, change, tmp_path, refused):
    assert "but the config beside it says" in refused(with_config(tmp_path, case, change))


def with_config(tmp_path: Path, case: str, change: dict) -> Path:
    folder = shutil.copytree(GOLDEN / case / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": "4"},
        {"num_attention_heads": [4]},
        {"num_attention_heads": 2.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"layer_norm_eps": "small"},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": -1e-6},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": 3e-6},
        {"hidden_act": "mish"},
        {"hidden_act": []},
        {"image_size": [1, 2, 3]},
        {"image_size": 0},
        {"id2label": [1]},
        {"vision_config": None},
    ],
    ids=str,
)
def test_config_that_cannot_be_read(change, tmp_path, refused):
    about = r"config beside .* cannot be read|heads|have epsilon|activation 'mish'|config beside it says"
    assert re.search(about, refused(with_config(tmp_path, "hf_vit", change)))


def test_epsilon_left_out_is_that_of_transformers(tmp_path):
    whole = convert(GOLDEN / "hf_vit/model")
    folder = shutil.copytree(GOLDEN / "hf_vit/model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_norm_eps") == 1e-12
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder).residual_scale == whole.residual_scale != 1


@pytest.mark.parametrize(
    ("text", "why"),
    [*((text, "JSON") for text in ("", "{", "[]", "null")), ("[" * 10**5, "config.json cannot be read: it is nested")],
    ids=lambda text: text[:4],
)
def test_config_that_is_no_json_object(text, why, tmp_path, refused):
    folder = shutil.copytree(GOLDEN / "hf_vit/model", tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert why in refused(folder)


def timm_folder(tmp_path: Path, *, args: dict | None = None, **change) -> Path:
    """A checkpoint beside a config.json of timm."""
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(vit(**{"head.weight": (3, 32), "head.bias": (3,)}), folder / "model.safetensors")
    args = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, num_classes=3) | (args or {})
    config = dict(architecture="vit_tiny_patch16_224", model_args=args, pretrained_cfg={"input_size": [3, 64, 64]})
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def test_timm_folder(tmp_path):
    assert convert(timm_folder(tmp_path), tmp_path / "out").arch == "vit_tiny_reg0_plain"


def test_timm_config_of_one_level_is_read(tmp_path):
    images = {"crop_pct": 0.5, "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    old = dict(architecture="vit_tiny_patch16_224", num_classes=5, num_features=192, input_size=[3, 224, 224])
    old |= dict(images, first_conv="patch_embed.proj", classifier="head", labels=[*"abcde"], license="mit")
    tmp_path.joinpath("config.json").write_text(json.dumps(old))
    shapes = {"head.weight": (5, 192), "head.bias": (5,)}
    save_file(vit(depth=12, dim=192, rows=197, **shapes), tmp_path / "model.safetensors")
    converted = conversion.convert(tmp_path)  # the license is read too
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).pretrained_cfg
    for key, wanted in images.items():
        assert json.loads(json.dumps([getattr(converted.preprocess, key), theirs[key]])) == [wanted, wanted]
    assert list(converted.label_names) == theirs["label_names"] == [*"abcde"]
    assert not any("not kept" in note for note in notes_of(converted))
    tmp_path.joinpath("config.json").write_text(json.dumps(old | {"novel": 1}))
    assert any(
        "not kept from the config beside the weights: novel" in note for note in notes_of(conversion.convert(tmp_path))
    )


def notes_of(converted: ModelBundle) -> tuple[str, ...]:
    return ConversionReport.of(converted).notes


@pytest.mark.parametrize(
    ("labels", "kept", "says"),
    [
        (["a", "b", "c"], ("a", "b", "c"), ""),
        ({"2": "c", "0": "a", "1": "b"}, ("a", "b", "c"), ""),
        ({"1": "a", "2": "b", "3": "c"}, None, "label_names, whose numbers are not those of classes"),
        (["a", "b"], None, "2 label names are not kept: the head has 3 outputs"),
    ],
    ids=str,
)
def test_labels_are_kept_or_the_loss_is_told(labels, kept, says, tmp_path):
    for change in (dict(label_names=labels), dict(pretrained_cfg={"input_size": [3, 64, 64], "label_names": labels})):
        converted = convert(timm_folder(tmp_path, **change))
        assert converted.label_names == kept
        assert says in " ".join(notes_of(converted))
        shutil.rmtree(tmp_path / "timm")


def test_unknown_keys_of_a_config_are_told(tmp_path):
    cfg = {"input_size": [3, 64, 64], "test_crop_pct": 0.9, "strange": 1}
    told = [note for note in notes_of(convert(timm_folder(tmp_path, pretrained_cfg=cfg, novel=True)))]
    assert any("not kept" in note and "novel, strange, test_crop_pct" in note for note in told)
    shutil.rmtree(tmp_path / "timm")
    folder = timm_folder(tmp_path)
    assert not any("not kept" in note for note in notes_of(convert(folder)))
    (folder / "config.json").write_text('{"pooling": "mean"}')
    assert any("not kept" in note and "pooling" in note for note in notes_of(convert(folder, num_heads=2)))
    folder = with_config(tmp_path, "hf_vit", {"window": 7, "id2label": {"1": "a", "2": "b"}})
    (folder / "preprocessor_config.json").write_text('{"do_rescale": false, "gamma": 2.2}')
    told = " ".join(notes_of(convert(folder)))
    for key in ("window", "id2label", "do_rescale", "gamma"):
        assert key in told
    folder = openclip_folder(tmp_path, {"twist": 1}, {})
    assert any("vision_cfg.twist" in note for note in notes_of(convert(folder)))
    (tmp_path / "dinov2").mkdir()
    shutil.copy(GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth", tmp_path / "dinov2")
    (tmp_path / "dinov2/config.json").write_text('{"pooling": "mean"}')
    assert any("config.json beside the weights tell" in n for n in notes_of(convert(tmp_path / "dinov2", **DINOV2)))


@pytest.mark.parametrize("case", ["hf_vit", "hf_deit", "hf_dinov2_reg", "hf_clip_vision"])
def test_configs_of_transformers_hold_nothing_unknown(case):
    assert not any("not kept" in note for note in notes_of(convert(GOLDEN / case / "model")))


def test_a_network_that_pools_nothing(tmp_path, refused):
    folder = timm_folder(tmp_path, args={"global_pool": "", "num_classes": 0})
    assert "set global_pool to 'token' or 'avg'" in refused(folder)
    headless = {name: t for name, t in load_file(folder / "model.safetensors").items() if "head" not in name}
    save_file(headless, folder / "model.safetensors")
    converted = convert(folder)
    assert converted.model_args["global_pool"] == "token"
    assert any("pools nothing" in note for note in notes_of(converted))
    args = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, num_classes=0, global_pool="")
    network = timm.create_model("vit_tiny_patch16_224", **args).eval()
    network.load_state_dict(headless)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(converted.build()(images), network(images)[:, 0])
    assert torch.equal(converted.build().forward_features(images), network.forward_features(images))


@pytest.mark.parametrize(
    "change",
    [
        dict(args={"patch_size": 0}),
        dict(args={"patch_size": 8}),
        dict(args={"img_size": 96}),
        dict(args={"depth": 3}),
        dict(args={"depth": 10**7}),
        dict(args={"embed_dim": 64}),
        dict(args={"mlp_ratio": 2}),
        dict(args={"reg_tokens": 4}),
        dict(args={"act_layer": "nothing"}),
        dict(args={"norm_layer": "rmsnorm"}),
        dict(args={"global_pool": "map"}),
        dict(args={"nothing": 1}),
        dict(args={"features_only": True}),
        dict(args={"pretrained": True}),
        dict(architecture="resnet18"),
        dict(architecture="vit_nothing"),
        dict(architecture="hf-hub:lab/model"),
        dict(architecture=["vit_tiny_patch16_224"]),
        dict(pretrained_cfg="none"),
        dict(pretrained_cfg={"mean": "none"}),
        dict(vitreg=[1]),
        dict(vitreg={"residual_scale": 3}),
        dict(vitreg={"positions": {"nothing": 1}}),
    ],
    ids=str,
)
def test_timm_config_of_another_network(change, tmp_path, refused):
    about = r"config beside|the config gives|has no model|blocks or norms|pools by|pretrained_cfg|depth is 10000000"
    assert re.search(about, refused(timm_folder(tmp_path, **change), VitregError))


def test_timm_config_cannot_load_a_file(tmp_path, saved, refused):
    payload = Payload(tmp_path / "was here")
    folder = timm_folder(tmp_path, args={"checkpoint_path": str(saved(payload))})
    assert "checkpoint_path" in refused(folder)
    assert not payload.mark.exists()


def test_positions_that_are_no_square(saved, refused, tmp_path):
    tensors = tensors_of("dinov2_vit_mlp_hub") | {"pos_embed": torch.randn(1, 1 + 6, 32)}
    source = saved(tensors)
    assert "give --img-size HEIGHT,WIDTH" in refused(source, **DINOV2)
    assert convert(source, tmp_path / "out", img_size=(28, 42), **DINOV2).model_args["img_size"] == [28, 42]


# Targets


def test_existing_targets(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        assert "exists: choose another folder" in refused(source, BundleError, tmp_path / name, **DINOV2)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "mine"


def test_target_that_cannot_be_made(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "file").write_text("mine")
    assert "cannot write to" in refused(source, BundleError, tmp_path / "file/out", **DINOV2)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_target_without_permission(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write to" in refused(source, BundleError, tmp_path / "locked/out", **DINOV2)


@pytest.mark.parametrize("full_after", [0, 1, 20])
def test_full_disk(full_after, tmp_path, saved, refused, monkeypatch):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    original, opened = Path.open, []

    def limited(path, mode="r", *args, **kwargs):
        file = original(path, mode, *args, **kwargs)
        if path.name != "model.safetensors" or "w" not in mode:
            return file
        opened.append(path)
        return Limited(file, full_after)

    monkeypatch.setattr(Path, "open", limited)
    assert "No space left on device" in refused(source, BundleError, **DINOV2)
    assert len(opened) == 1


class Limited:
    """A file on a disk that is full after some writes."""

    def __init__(self, file, writes: int):
        self.file, self.writes = file, writes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        if not self.writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes -= 1
        return self.file.write(data)


def test_limited_file_size(saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # Python ignores the signal, so the write fails
    try:
        says = refused(source, BundleError, **DINOV2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert says.endswith("out: File too large.")


def openclip_folder(tmp_path: Path, vision: dict, text: dict) -> Path:
    """A whole OpenCLIP model beside its config."""
    folder = tmp_path / "openclip"
    folder.mkdir()
    shutil.copy(GOLDEN / "openclip_full_plain/checkpoint.safetensors", folder / "open_clip_model.safetensors")
    model = OPENCLIP_CONFIG["model_cfg"]
    model = model | {"vision_cfg": model["vision_cfg"] | vision, "text_cfg": model["text_cfg"] | text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return folder


@pytest.mark.parametrize(
    "vision",
    [
        {"width": 64},
        {"layers": [1, 2, 3, 4]},
        {"patch_size": 16},
        {"image_size": 64},
        {"head_width": 0},
        {"head_width": 5},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-6}},
        {"norm_kwargs": {"elementwise_affine": False}},
        {"timm_model_name": "resnet18"},
        {"timm_model_name": "vit_tiny_patch16_224"},
    ],
    ids=str,
)
def test_openclip_config_of_another_network(vision, tmp_path, refused):
    about = r"config beside|heads|does not pool|has arguments|have epsilon|not its VisionTransformer"
    assert re.search(about, refused(openclip_folder(tmp_path, vision, {})))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"width": 48}, "does not fit open_clip's model"),
        ({"heads": 7}, "open_clip cannot build"),
        ({"hf_model_name": "lab/none"}, "open_clip cannot build"),  # of which open_clip would download the config
    ],
    ids=str,
)
def test_text_tower_of_another_network(text, says, tmp_path, refused):
    folder = openclip_folder(tmp_path, {}, text)
    assert says in refused(folder, text_tower=True)
    assert convert(folder, tmp_path / "out").spec.family == "clip_quickgelu"


def test_text_tower_where_there_is_none(refused):
    source = GOLDEN / "openclip_vision_gelu/checkpoint.safetensors"
    assert "has no text tower" in refused(source, num_heads=2, act="gelu", text_tower=True)
    source = GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth"
    assert "only OpenCLIP's text towers are kept" in refused(source, num_heads=2, text_tower=True)


def test_full_disk_under_the_text_tower_leaves_neither_folder(tmp_path, refused, monkeypatch):
    source = shutil.copy(GOLDEN / "openclip_full_plain/checkpoint.safetensors", tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPENCLIP_CONFIG))
    original = Path.open

    def limited(path, mode="r", *args, **kwargs):
        file = original(path, mode, *args, **kwargs)
        return Limited(file, 1) if path.name == "open_clip_model.safetensors" and "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        assert "No space left on device" in refused(source, BundleError, text_tower=True)
    before = set(tmp_path.iterdir())
    convert(source, tmp_path / "out", text_tower=True)
    made = set(tmp_path.iterdir()) - before
    assert len(made) == 2
    shutil.rmtree(tmp_path / "out")
    assert "exists: choose another folder" in refused(source, BundleError, text_tower=True)
