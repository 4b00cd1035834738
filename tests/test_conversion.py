"""Converting: new registers, heads, the text tower, the report and the card, streaming, and the command line."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from golden_cases import ARGUMENTS, FOLDER, NORMED, bundle, images, native, outputs, recorded, source
from safetensors.torch import load_file, save_file

from vitreg_hub.arch import REGISTER_INIT_STD
from vitreg_hub.bundle import ModelBundle
from vitreg_hub.cli import main
from vitreg_hub.conversion import convert
from vitreg_hub.conversion.formats import FORMATS
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import ConversionError
from vitreg_hub.model_cards.card import render
from vitreg_hub.positions import PositionRule


@pytest.mark.parametrize("case", ["dinov2_vit_mlp_hub", "deit3_ls", "openclip_vision_gelu", "hf_vit", "hf_clip_vision"])
def test_new_registers_are_drawn_and_nothing_else_changes(case):
    without = bundle(case)
    with_registers = convert(source(case), num_registers=4, **ARGUMENTS[case])
    assert with_registers.arch == without.arch.replace("reg0", "reg4")
    assert with_registers.positions == without.positions
    registers = with_registers.state_dict["reg_token"] / without.residual_scale
    width = without.model_args["embed_dim"]
    assert registers.shape == (1, 4, width)
    assert len({tuple(row.tolist()) for row in registers[0]}) == 4
    assert abs(registers.std().item() / REGISTER_INIT_STD - 1) < 0.25
    assert abs(registers.mean().item()) < 4 * REGISTER_INIT_STD / (4 * width) ** 0.5
    for name, tensor in without.state_dict.items():
        assert torch.equal(with_registers.state_dict[name], tensor), name
    again = convert(source(case), num_registers=4, **ARGUMENTS[case])
    assert torch.equal(again.state_dict["reg_token"], with_registers.state_dict["reg_token"])


def test_new_registers_are_announced(folder, capsys):
    main(["convert", str(source("deit3_ls")), str(folder), "--num-heads", "4", "--registers", "2"])
    printed = capsys.readouterr().out
    report = ConversionReport.of(ModelBundle.load(folder))
    card = (folder / "README.md").read_text()
    assert report.untrained_registers == 2
    assert "vit_small_reg2_deit3" in printed
    for text in (printed, card, *report.notes):
        assert "untrained" in text
    assert "2046" in printed


def test_the_distillation_token_becomes_a_register():
    case = "deit_distilled"
    converted = convert(source(case), num_registers=1, **ARGUMENTS[case])
    assert converted.arch == "vit_tiny_reg1_plain"
    report = ConversionReport.of(converted)
    assert report.untrained_registers == 0
    assert [sorted(names) for why, names in report.dropped.items() if "one head" in why] == [
        ["head_dist.bias", "head_dist.weight"]
    ]
    model = converted.build(dynamic_img_size=True)
    for size, x in images(case).items():
        expected, found = recorded(case, size), outputs(model, x)
        assert (found["tokens"] - expected["tokens"]).abs().max() < NORMED
        raw = load_file(FOLDER / case / "expected.safetensors")[f"{size[0]}x{size[1]}.logits_cls"]
        assert (found["output"] - raw).abs().max() < NORMED


def test_more_registers_beside_the_distillation_token():
    converted = convert(source("deit_distilled"), num_registers=4, **ARGUMENTS["deit_distilled"])
    one = convert(source("deit_distilled"), num_registers=1, **ARGUMENTS["deit_distilled"])
    registers = converted.state_dict["reg_token"]
    assert torch.equal(registers[:, :1], one.state_dict["reg_token"])
    assert 0 < registers[:, 1:].std() < 2 * REGISTER_INIT_STD
    assert ConversionReport.of(converted).untrained_registers == 3


def test_a_bundle_gets_registers(folder):
    bundle("dinov2_vit_mlp_hub").save(folder)
    converted = convert(folder, num_registers=4)
    assert converted.arch == "vit_nano_reg4"
    assert converted.positions == PositionRule(antialias=False, offset=0.1)
    assert torch.equal(converted.state_dict["cls_token"], bundle("dinov2_vit_mlp_hub").state_dict["cls_token"])


@pytest.mark.parametrize("case", ["hf_vit_eps_probe", "hf_deit"])
def test_a_bundle_with_another_epsilon_converts_again(case, folder):
    bundle(case).save(folder)
    again = convert(folder)
    assert again.residual_scale == bundle(case).residual_scale == 1024
    for name, tensor in bundle(case).state_dict.items():
        assert torch.equal(again.state_dict[name], tensor)


@pytest.mark.parametrize(
    "arch", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_clip_quickgelu_224", "deit3_small_patch16_224"]
)
def test_timm_folders_convert_with_their_facts(arch, tmp_path):
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 56 if "14" in arch else 64}
    model = timm.create_model(arch, num_classes=7, **small).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=small)
    converted = convert(tmp_path / "timm")
    x = torch.randn(2, 3, small["img_size"], small["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(converted.build()(x), model(x), rtol=0, atol=1e-6)
        tokens = model.forward_features(x)
        torch.testing.assert_close(converted.build().forward_features(x), tokens, rtol=0, atol=1e-6)
    assert converted.num_classes == 7
    assert converted.preprocess.mean == model.pretrained_cfg["mean"]
    assert converted.spec.lineage.pre_norm == ("clip" in arch)


def test_widths_that_the_lineage_released_need_no_heads(tmp_path):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=1, img_size=28, num_classes=0)
    weights = {name.replace("reg_token", "register_tokens"): tensor for name, tensor in model.state_dict().items()}
    weights |= {"mask_token": torch.zeros(1, 384), "pos_embed": torch.randn(1, 5, 384)}
    torch.save(weights, tmp_path / "dinov2.pth")
    assert convert(tmp_path / "dinov2.pth").model_args["num_heads"] == 6


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


def test_the_report_accounts_for_every_tensor(folder):
    case = "openclip_full_plain"
    convert(source(case), folder, verify=True, **ARGUMENTS[case])
    report = ConversionReport.of(ModelBundle.load(folder))
    names = load_file(source(case)).keys()
    dropped = {name for group in report.dropped.values() for name in group}
    assert dropped == {name for name in names if not name.startswith("visual.")}
    assert report.num_mapped == len(names) - len(dropped)
    assert report.sha256 == {source(case).name: hashlib.sha256(source(case).read_bytes()).hexdigest()}
    assert report.source == source(case).name  # not the path to it
    assert report.measured["output"] < 5e-6
    assert report.measured["reference"].startswith("open_clip")
    assert str(source(case).parent) not in (folder / "config.json").read_text() + (folder / "README.md").read_text()


def test_the_card_is_that_of_the_loaded_bundle(folder):
    case = "openclip_full_plain"  # reasons and files in another order than the alphabet's
    loaded = convert(source(case), folder, num_registers=4, verify=True, **ARGUMENTS[case])
    assert (folder / "README.md").read_text() == render(loaded)  # so that `push` can put the repository's name in
    assert "4 of the registers are new and untrained" in render(loaded)


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("dinov2_vit_mlp_hub", "timm"),
        ("dinov2_reg4", "timm"),
        ("deit_distilled", "timm"),
        ("hf_vit_eps_probe", "ViTModel"),
        ("hf_clip_vision", "CLIPVisionModelWithProjection"),
        ("openclip_timm_tower", "timm"),
    ],
)
def test_verify_measures_against_others(case, reference):
    args = ARGUMENTS[case] | ({"num_registers": 4} if "reg" not in case else {}) | {"img_size": native(case)[0] * 2}
    measured = ConversionReport.of(convert(source(case), verify=True, **args)).measured
    assert measured.pop("reference").startswith(reference)
    assert 0 <= max(measured.values()) < 1e-5


def test_verify_sees_a_difference(monkeypatch):
    case = "dinov2_vit_mlp_hub"
    monkeypatch.setattr(
        "vitreg_hub.conversion.assembly.Assembly.make", lambda self, name: torch.ones(self.wanted[name])
    )
    measured = ConversionReport.of(convert(source(case), verify=True, **ARGUMENTS[case])).measured
    assert measured["tokens"] > 0.1


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


def test_labels_and_images_of_transformers_are_kept(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    labels = {0: "cat", 1: "dog", 2: "emu"}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = ViTForImageClassification(ViTConfig(intermediate_size=48, id2label=labels, **shape)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    converted = convert(tmp_path)
    assert converted.label_names == ("cat", "dog", "emu")
    assert converted.preprocess.mean == (0.1, 0.2, 0.3)
    assert (converted.preprocess.interpolation, converted.preprocess.crop_mode) == ("bilinear", "squash")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(converted.build()(x), model(x).logits, rtol=0, atol=1e-6)


PEAK = """
import sys, timm, torch
from pathlib import Path
from vitreg_hub.conversion import convert

def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])

Path("/proc/self/clear_refs").write_text("5")
before = peak()
convert(sys.argv[1], sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_large_file_is_never_in_memory_as_a_whole(suffix, tmp_path):
    width, depth = 1024, 14
    shapes = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,)}
    shapes |= {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)}
    shapes |= {"attn.proj.bias": (width,), "ls1.gamma": (width,), "ls2.gamma": (width,), "mlp.fc1.bias": (4 * width,)}
    shapes |= {"mlp.fc1.weight": (4 * width, width), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    weights = {f"blocks.{i}.{name}": torch.zeros(shape) for i in range(depth) for name, shape in shapes.items()}
    weights |= {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 17, width)}
    weights |= {"mask_token": torch.zeros(1, width), "norm.weight": torch.zeros(width), "norm.bias": torch.zeros(width)}
    weights |= {"patch_embed.proj.weight": torch.zeros(width, 3, 14, 14), "patch_embed.proj.bias": torch.zeros(width)}
    path = tmp_path / f"large{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    megabytes = path.stat().st_size / 2**20
    assert megabytes > 650
    del weights
    run = subprocess.run(
        [sys.executable, "-c", PEAK, path, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) / 1024 < 450


def test_help_shows_every_format_and_option(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for word in (*FORMATS, "--arch", "--img-size", "--registers", "--verify", "--text-tower", "--num-heads", "--act"):
        assert word in printed


def test_command_line_round_trip(folder, tmp_path, capsys):
    main(
        [
            "convert",
            str(source("dinov2_vit_mlp_hub")),
            str(folder),
            "--num-heads",
            "2",
            "--img-size",
            "84,42",
            "--verify",
        ]
    )
    printed = capsys.readouterr().out
    assert "difference   0 in tokens, to timm" in printed
    assert "4x4 patches were resampled to 6x3" in printed
    assert ModelBundle.load(folder).preprocess.input_size == (3, 84, 42)
    main(["convert", str(source("dinov2_reg4")), str(tmp_path / "reg"), "--num-heads", "4"])
    main(["export", str(tmp_path / "reg"), str(tmp_path / "hf"), "--format", "hf-dinov2-with-registers"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_register_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.pth", "out"], "nowhere.pth is neither a file nor a folder"),
        ([str(source("dinov2_reg4")), "out"], "give --num-heads"),
        ([str(source("dinov2_reg4")), "out", "--format", "dinov4"], "no format 'dinov4'"),
        ([str(source("dinov2_reg4")), "out", "--arch", "vit_larg_reg4"], "closest: vit_large_reg4"),
        ([str(source("dinov2_reg4")), "out", "--num-heads", "4", "--img-size", "0"], "--img-size takes a side"),
        ([str(source("dinov2_reg4")), "out", "--num-heads", "4", "--img-size", "57"], "57x57 pixels does not divide"),
        ([str(source("dinov2_reg4")), "out", "--num-heads", "4", "--registers", "8"], "has 4 registers already"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["convert", *arguments])
    assert sentence in str(ended.value.code)
    assert list(tmp_path.iterdir()) == []
