"""OpenCLIP's models: what their config tells, what only the user tells, and the text tower that is kept."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import convert
from golden_cases import ARGUMENTS, FOLDER, NORMED, images, native, recorded, source
from optional import usable
from safetensors.torch import load_file, save_file

from vitreg_hub.errors import ConversionError

open_clip = usable("open_clip", project="open_clip_torch")


def openclip_file(path: Path, **shape: int) -> Path:
    tower = open_clip.transformer.VisionTransformer(image_size=32, patch_size=16, mlp_ratio=4, output_dim=8, **shape)
    save_file({f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}, path)
    return path


def test_arch_tells_the_activation(tmp_path):
    path = openclip_file(tmp_path / "b16.safetensors", width=768, layers=12, heads=12)
    with pytest.raises(ConversionError, match="give --act"):
        convert(path)
    assert convert(path, arch="vit_base_reg0_clip").arch == "vit_base_reg0_clip"
    assert convert(path, arch="vit_base_reg0_clip_quickgelu").arch == "vit_base_reg0_clip_quickgelu"
    with pytest.raises(ConversionError, match="family clip, not clip_quickgelu"):
        convert(path, arch="vit_base_reg0_clip_quickgelu", act="gelu")


def test_width_1280_has_16_or_20_heads(tmp_path):
    path = openclip_file(tmp_path / "h.safetensors", width=1280, layers=1, heads=16)
    with pytest.raises(ConversionError, match=r"give --num-heads .*16 or 20"):
        convert(path, act="gelu")
    assert convert(path, act="gelu", num_heads=16).model_args["num_heads"] == 16


def openclip_folder(case: str, folder: Path) -> Path:
    """A recorded checkpoint with the config that OpenCLIP publishes beside it."""
    folder.mkdir()
    meta = json.loads((FOLDER / case / "meta.json").read_text())["constructor"]
    config = {"model_cfg": meta, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = (
        load_file(source(case)) if source(case).suffix == ".safetensors" else torch.load(source(case))["state_dict"]
    )
    save_file({k.removeprefix("module."): v for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("case", ["openclip_full_plain", "openclip_full_module_pth"])
def test_openclip_config_tells_and_the_text_tower_is_kept(case, tmp_path):
    given = openclip_folder(case, tmp_path / "given")
    converted = convert(given, tmp_path / "bundle", text_tower=True)  # heads and activation from the config
    assert converted.preprocess.mean == (0.5, 0.5, 0.5)
    x, size = images(case)[native(case)], native(case)
    assert (converted.build()(x) - recorded(case, size)["output"]).abs().max() < NORMED

    model = open_clip.create_model(f"local-dir:{tmp_path / 'bundle-open_clip'}").eval()
    raw = load_file(FOLDER / case / "expected.safetensors")
    text = load_file(FOLDER / case / "inputs.safetensors")["text"]
    with torch.no_grad():
        assert (model.encode_text(text) - raw["text_embed"]).abs().max() < NORMED
        assert (model.encode_image(x) - recorded(case, size)["output"]).abs().max() < NORMED
        assert torch.equal(model.logit_scale, raw["logit_scale"])


def test_the_text_tower_of_a_bare_file(tmp_path):
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 7, "vocab_size": 50, "width": 128, "heads": 2, "layers": 3}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "epoch_1.pt")
    out = tmp_path / "bundle"
    convert(tmp_path / "epoch_1.pt", out, num_heads=2, act="quick_gelu", num_registers=4, text_tower=True, img_size=64)
    kept = open_clip.create_model(f"local-dir:{out}-open_clip").eval()
    tokens, x = torch.randint(1, 50, (3, 7)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(kept.encode_text(tokens), model.encode_text(tokens))
        assert torch.equal(kept.encode_image(x), model.encode_image(x))


@pytest.mark.parametrize("pool", ["token", "avg", None])
def test_an_openclip_timm_tower_pools_as_its_config_says(pool, tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_proj": "linear"}
    vision |= {"timm_pool": pool} if pool else {}  # avg where it is left out
    text = {"context_length": 7, "vocab_size": 50, "width": 64, "heads": 1, "layers": 1}
    model = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True}}
    config["preprocess_cfg"] = {"interpolation": "bilinear", "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    converted = convert(tmp_path)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (converted.build()(x) - model.encode_image(x)).abs().max() < NORMED
    assert (converted.preprocess.interpolation, converted.preprocess.crop_mode) == ("bilinear", "squash")


def test_a_slash_after_the_target_does_not_move_the_text_tower(tmp_path):
    given = openclip_folder("openclip_full_plain", tmp_path / "given")
    convert(given, f"{tmp_path}/bundle/", text_tower=True)
    assert {path.name for path in tmp_path.iterdir()} == {"given", "bundle", "bundle-open_clip"}


def test_a_text_tower_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="no text tower"):
        convert(source("openclip_vision_gelu"), tmp_path / "out", text_tower=True, **ARGUMENTS["openclip_vision_gelu"])
    with pytest.raises(ConversionError, match="only OpenCLIP's"):
        convert(source("dinov2_reg4"), tmp_path / "out", text_tower=True, num_heads=4)
    with pytest.raises(ConversionError, match=r"open_clip_config\.json"):
        convert(source("openclip_full_plain"), tmp_path / "out", text_tower=True, **ARGUMENTS["openclip_full_plain"])
    with pytest.raises(ConversionError, match="give `out`"):
        convert(source("openclip_full_plain"), text_tower=True, **ARGUMENTS["openclip_full_plain"])
    assert list(tmp_path.iterdir()) == []
