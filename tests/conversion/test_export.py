"""Bundles back in the forms of other lineages, opened by these lineages' own code."""

import dataclasses
import json

import pytest
import timm
import torch
import transformers
from checkpoints import convert
from golden_cases import ARGUMENTS, bundle, images, native, source
from open_clip.transformer import VisionTransformer as OpenClipTower
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from timm.layers import QuickGELU
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion import export
from vitreg_hub.conversion.exporter import EXPORTS
from vitreg_hub.errors import BundleError, ConversionError

FILES = [
    ("dinov2_vit_mlp_hub", "dinov2"),
    ("dinov2_vit_mlp_chunked", "dinov2"),
    ("dinov2_reg4", "dinov2"),
    ("dinov2_swiglu_reg4", "dinov2"),
    ("hf_dinov2", "dinov2"),
    ("phreg_student", "dinov2"),
    ("deit_base", "deit"),
    ("deit_distilled", "deit"),
    ("deit3_ls", "deit3"),
    ("openclip_vision_gelu", "openclip"),
    ("openclip_full_plain", "openclip"),
    ("hf_clip_vision", "openclip"),
]
TIMM_FILES = [("hf_vit", "timm"), ("openclip_vision_quickgelu", "timm")]
FOLDERS = [
    ("dinov2_vit_mlp_hub", "hf-dinov2"),
    ("dinov2_reg4", "hf-dinov2-with-registers"),
    ("dinov2_swiglu_reg4", "hf-dinov2-with-registers"),
    ("phreg_student", "hf-dinov2-with-registers"),
    ("deit_base", "hf-vit"),
    ("hf_vit", "hf-vit"),
    ("hf_vit_eps_probe", "hf-vit"),
    ("deit_distilled", "hf-deit"),
    ("hf_deit", "hf-deit"),
    ("hf_clip_vision", "hf-clip"),
    ("openclip_vision_gelu", "hf-clip"),
]


@torch.no_grad()
def ours(converted: ModelBundle, x: Tensor) -> tuple[Tensor, Tensor]:
    model = converted.build()
    return model.forward_features(x), model(x)


def as_arguments(case: str, fmt: str) -> dict:
    """What a bare file of a format does not tell."""
    args = bundle(case).model_args
    told = {"format": fmt} if fmt == "timm" else {}
    act = {"act": "quick_gelu" if "quick" in bundle(case).arch else "gelu"} if fmt == "openclip" else {}
    return told | act | {"num_heads": args["num_heads"]}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("case", "fmt"), [*FILES, *TIMM_FILES])
def test_a_file_converts_back_to_equal_outputs(case, fmt, suffix, tmp_path):
    path = export(bundle(case), tmp_path / f"exported{suffix}", format=fmt)
    act = {"act": "quick_gelu"} if case == "openclip_vision_quickgelu" else {}
    back = convert(path, **as_arguments(case, fmt) | act)
    x = images(case)[native(case)]
    tokens, output = ours(bundle(case), x)
    tokens_back, output_back = ours(back, x)
    torch.testing.assert_close(tokens_back, tokens, rtol=0, atol=1e-5 if fmt != "timm" else 0)
    torch.testing.assert_close(output_back, output, rtol=0, atol=1e-5 if fmt != "timm" else 0)


@pytest.mark.parametrize("case", ["dinov2_vit_mlp_hub", "dinov2_reg4", "dinov2_swiglu_reg4", "deit_base", "deit3_ls"])
def test_a_file_has_the_tensors_of_the_original(case, tmp_path):
    fmt = "dinov2" if case.startswith("dinov2") else case.partition("_")[0]
    path = export(bundle(case), tmp_path / "exported.pth", format=fmt)
    written, original = (read(file) for file in (path, source(case)))
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in original.items()}
    changed = {name for name in original if not torch.equal(written[name], original[name])}
    assert changed <= {"cls_token", "pos_embed", "mask_token"}  # the position of the class token is in it now
    first_row = written["pos_embed"][:, :1] if fmt != "deit3" else torch.zeros(1)
    original_row = original["pos_embed"][:, :1] if fmt != "deit3" else torch.zeros(1)
    assert torch.equal(written["cls_token"] + first_row, original["cls_token"] + original_row)


def read(path) -> dict[str, Tensor]:
    loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return loaded.get("model", loaded)


@pytest.mark.parametrize(
    "case", ["dinov2_vit_mlp_hub", "dinov2_reg4", "dinov2_swiglu_reg4", "deit_base", "deit_distilled"]
)
def test_timm_loads_a_file(case, tmp_path):
    converted = bundle(case)
    fmt = "dinov2" if case.startswith("dinov2") else "deit"
    weights = read(export(converted, tmp_path / "exported.pth", format=fmt))
    args = converted.model_args | {"no_embed_class": "reg" in case, "num_classes": converted.num_classes}
    model = timm.create_model(converted.spec.base, **args).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    x = images(case)[native(case)]
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), ours(converted, x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["openclip_vision_gelu", "openclip_full_plain", "hf_clip_vision"])
def test_open_clip_loads_a_file(case, tmp_path):
    converted = bundle(case)
    weights = read(export(converted, tmp_path / "exported.safetensors", format="openclip"))
    args = converted.model_args
    tower = OpenClipTower(
        image_size=args["img_size"][0],
        patch_size=args["patch_size"],
        width=args["embed_dim"],
        layers=args["depth"],
        heads=args["num_heads"],
        mlp_ratio=4,
        act_layer=QuickGELU if "quick" in converted.arch else torch.nn.GELU,
        output_dim=converted.num_classes,
    ).eval()
    tower.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in weights.items()})
    x = images(case)[native(case)]
    with torch.no_grad():
        torch.testing.assert_close(tower(x), ours(converted, x)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "fmt"), FOLDERS)
def test_transformers_opens_a_folder_and_it_converts_back(case, fmt, folder):
    converted = bundle(case)
    export(converted, folder, format=fmt)
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {name.partition(".")[0] for name in info["missing_keys"]} <= {"pooler"}  # a layer that timm does not have
    x = images(case)[native(case)]
    tokens, output = ours(converted, x)
    with torch.no_grad():
        theirs = model.eval()(x)
    if hasattr(theirs, "image_embeds"):
        torch.testing.assert_close(theirs.image_embeds, output, rtol=0, atol=1e-5)
    elif "logits" in theirs:
        torch.testing.assert_close(theirs.logits, output, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(theirs.last_hidden_state, tokens, rtol=0, atol=1e-5)
    back = convert(folder)
    torch.testing.assert_close(ours(back, x)[0], tokens, rtol=0, atol=1e-5)
    assert back.preprocess.crop_pct == pytest.approx(converted.preprocess.crop_pct, rel=0.01)  # whole pixels there
    assert dataclasses.replace(back.preprocess, crop_pct=converted.preprocess.crop_pct) == converted.preprocess
    image = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 600, 300))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(converted.to_json()["pretrained_cfg"]))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values[0]
    assert pixels.std() > 0.1
    assert (pixels - transform(image)).abs().mean() < 0.03  # resizing by pillow and by torch differs a little


def test_registers_leave_and_enter_as_they_are(tmp_path):
    converted = bundle("dinov2_reg4")
    path = export(converted, tmp_path / "exported.pth", format="dinov2")
    assert torch.equal(read(path)["register_tokens"], converted.state_dict["reg_token"])


@pytest.mark.parametrize(
    ("case", "fmt", "reason"),
    [
        ("dinov2_reg4", "hf-dinov2", "no place for reg_token"),
        ("dinov2_reg4", "deit3", "no place for reg_token"),
        ("dinov2_vit_mlp_hub", "hf-dinov2-with-registers", "no registers"),
        ("dinov2_swiglu_reg4", "deit", "SwiGLU"),
        ("deit_base", "dinov2", "no LayerScale"),
        ("deit_base", "openclip", "no norm before the first block"),
        ("deit_base", "hf-deit", "no distillation token"),
        ("deit3_ls", "dinov2", "no place for head.weight"),
        ("hf_vit", "deit", "epsilon"),
        ("openclip_vision_quickgelu", "dinov2", "quick_gelu"),
        ("deit_distilled", "hf-vit", "no place for dist_token"),
    ],
)
def test_what_a_lineage_cannot_hold_is_refused(case, fmt, reason, tmp_path):
    out = tmp_path / ("exported" if fmt.startswith("hf-") else "exported.pth")
    with pytest.raises(ConversionError, match=reason):
        export(bundle(case), out, format=fmt)
    assert list(tmp_path.iterdir()) == []


def test_wrong_targets_are_refused(tmp_path):
    converted = bundle("dinov2_reg4")
    (tmp_path / "there.pth").write_text("mine")
    for out, fmt, reason in [
        ("there.pth", "dinov2", "exists"),
        ("folder", "dinov2", r"\.pth or \.safetensors"),
        ("file.pth", "hf-dinov2-with-registers", "is a folder"),
        ("file.pth", "dinov3", "no export to 'dinov3'"),
    ]:
        with pytest.raises((BundleError, ConversionError), match=reason):
            export(converted, tmp_path / out, format=fmt)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pth"]
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_every_export_is_tested():
    assert {fmt for _, fmt in [*FILES, *TIMM_FILES, *FOLDERS]} == set(EXPORTS) - {"dino"}  # has a test of its own


def test_dino_round_trip(tmp_path):
    weights = {k: v for k, v in read(source("deit_base")).items() if not k.startswith("head.")}
    torch.save(weights, tmp_path / "dino.pth")
    converted = convert(tmp_path / "dino.pth", format="dino", **ARGUMENTS["deit_base"])
    back = convert(export(converted, tmp_path / "back.pth", format="dino"), format="dino", **ARGUMENTS["deit_base"])
    x = images("deit_base")[native("deit_base")]
    torch.testing.assert_close(ours(back, x)[0], ours(converted, x)[0], rtol=0, atol=1e-5)
