"""Converting: new registers, heads, the text tower, the report and the card, streaming, and the command line."""

import hashlib
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import timm
import torch
import transformers
from checkpoints import convert
from golden_cases import ARGUMENTS, FOLDER, NORMED, bundle, images, native, outputs, recorded, source
from models import randomised
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image

from vitreg_hub import environment
from vitreg_hub.arch import REGISTER_INIT_STD
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.cli import main
from vitreg_hub.conversion.formats.detect import FORMATS
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import ConversionError
from vitreg_hub.model_cards.card import render
from vitreg_hub.network.positions import PositionRule

NO_LICENSE = ("--license", "unknown")


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
    main(["convert", str(source("deit3_ls")), str(folder), "--num-heads", "4", "--registers", "2", *NO_LICENSE])
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


@pytest.mark.parametrize("case", ["hf_vit", "hf_deit", "dinov2_vit_mlp_hub", "deit_distilled"])
def test_registers_come_alike_to_a_checkpoint_and_to_its_bundle(case, folder):
    bundle(case).save(folder)
    by_bundle = convert(folder, num_registers=4)
    at_once = convert(source(case), num_registers=4, **ARGUMENTS[case])
    assert by_bundle.state_dict.keys() == at_once.state_dict.keys()
    for name, tensor in at_once.state_dict.items():
        assert torch.equal(by_bundle.state_dict[name], tensor), name


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
    license = timm.get_pretrained_cfg(arch).license  # of one it is non-commercial
    converted = convert(tmp_path / "timm", license=license)
    assert converted.provenance.license == license is not None
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


def test_arch_must_be_what_the_tensors_are(tmp_path):
    model = timm.create_model("deit3_small_patch16_224", num_classes=7)
    save_file(model.state_dict(), tmp_path / "deit3.safetensors")
    assert convert(tmp_path / "deit3.safetensors", arch="vit_small_reg0_deit3").arch == "vit_small_reg0_deit3"
    with pytest.raises(ConversionError, match=r"is not vit_small_reg0: it has patch size \(16, 16\), not \(14, 14\)"):
        convert(tmp_path / "deit3.safetensors", arch="vit_small_reg0")


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


def test_a_conversion_tells_how_it_was_made(folder, monkeypatch):
    words = ["convert", str(source("dinov2_reg4")), str(folder), "--num-heads", "4", *NO_LICENSE]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vitreg", *words])
    before = datetime.now(UTC).replace(microsecond=0)
    main()
    made = ModelBundle.load(folder).provenance
    assert before <= datetime.fromisoformat(made.created) <= datetime.now(UTC)
    assert made.command == "vitreg convert checkpoint.pth bundle --num-heads 4 --license unknown"
    assert made.commit == environment.commit()
    assert made.hardware == environment.hardware()
    assert 0 < made.seconds < 600
    assert made.versions["torch"] == torch.__version__.partition("+")[0]


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


def test_verify_says_what_it_compared(tmp_path):
    def measured(**options) -> dict:
        return ConversionReport.of(convert(source("dinov2_reg4"), verify=True, num_heads=4, **options)).measured

    assert measured()["reference"].endswith("on images of 56x56 and 28x28")
    assert measured(img_size=84)["reference"].endswith("on images of 84x84 and 70x70")
    added = convert(source("deit3_ls"), verify=True, num_registers=4, img_size=128, **ARGUMENTS["deit3_ls"])
    assert (
        ConversionReport.of(added)
        .measured["reference"]
        .endswith("on images of 128x128 and 80x80, without new registers")
    )


def test_a_reference_that_cannot_run_is_no_reason_to_refuse(tmp_path):
    weights = load_file(source("dinov2_swiglu_reg4"))
    for name in [name for name in weights if ".w12." in name]:
        for part, half in zip(("w1", "w2"), weights.pop(name).chunk(2), strict=True):
            weights[name.replace("w12", part)] = half.contiguous()
    save_file(weights, tmp_path / "unpacked.safetensors")
    converted = convert(tmp_path / "unpacked.safetensors", num_heads=2, verify=True)
    measured = ConversionReport.of(converted).measured
    assert measured.keys() == {"reference"}
    assert "cannot load it" in measured["reference"]
    assert "\n" not in measured["reference"]
    for name, tensor in bundle("dinov2_swiglu_reg4").state_dict.items():
        assert torch.equal(converted.state_dict[name], tensor)


def test_verify_reads_half_precision_and_the_named_file(tmp_path):
    shutil.copytree(source("hf_dinov2"), tmp_path / "model")
    weights = {name: tensor.half() for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"dtype": "float16"}))  # as transformers saves it
    assert ConversionReport.of(convert(tmp_path / "model", verify=True)).measured["tokens"] < 1e-5
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model/other.safetensors")
    measured = ConversionReport.of(convert(tmp_path / "model/other.safetensors", verify=True)).measured
    assert measured.keys() == {"reference"}  # transformers would open the other file


def test_verify_sees_a_difference(monkeypatch):
    case = "dinov2_vit_mlp_hub"
    monkeypatch.setattr(
        "vitreg_hub.conversion.planning.plan.Plan.make", lambda self, name: torch.ones(self.wanted[name])
    )
    measured = ConversionReport.of(convert(source(case), verify=True, **ARGUMENTS[case])).measured
    assert measured["tokens"] > 0.1


@pytest.mark.parametrize("size", [None, 84])
@pytest.mark.parametrize("broken", ["another rule", "no resampling"])
def test_verify_measures_what_was_written_and_its_resampling(broken, size, folder, monkeypatch):
    original = PositionRule.resample

    def resample(rule, table, *, old, new):
        rows = original(PositionRule(antialias=True), table, old=old, new=new)
        return rows if broken == "another rule" or old == new else torch.zeros_like(rows)

    monkeypatch.setattr(PositionRule, "resample", resample)
    case = "dinov2_vit_mlp_hub"
    converted = convert(source(case), folder, verify=True, img_size=size, **ARGUMENTS[case])
    assert ConversionReport.of(converted).measured["tokens"] > 1e-3


@pytest.mark.parametrize(
    "pooling",
    [{"global_pool": "token", "fc_norm": True}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}],
)
def test_timm_folders_keep_their_pooling(pooling, tmp_path):
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, **pooling}
    model = randomised(timm.create_model("vit_tiny_patch16_224", num_classes=7, **small))
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=small)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (convert(tmp_path / "timm").build()(x) - model(x)).abs().max() < NORMED


def test_what_no_tensor_tells_is_in_the_report(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=7)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    report = ConversionReport.of(convert(tmp_path / "bare.safetensors"))
    assert report.network["heads"] == 3
    assert report.network["epsilon"] == "1e-06"
    assert any("the class token is pooled" in note for note in report.notes)
    assert any("mean and std of images are timm's usual ones" in note for note in report.notes)
    report = ConversionReport.of(convert(tmp_path / "bare.safetensors", num_heads=6))
    assert any("6 heads as asked for; timm has 3 at width 192" in note for note in report.notes)


def test_the_config_of_a_dinov2_run_tells_how_it_resampled(tmp_path):
    weights = {f"backbone.{name}": tensor for name, tensor in torch.load(source("dinov2_reg4")).items()}
    place = tmp_path / "eval" / "training_9"
    place.mkdir(parents=True)
    torch.save({"teacher": weights}, place / "teacher_checkpoint.pth")
    released = convert(place / "teacher_checkpoint.pth", num_heads=4)
    assert released.positions == PositionRule(antialias=True)
    assert any("config.yaml" in note for note in ConversionReport.of(released).notes)
    (tmp_path / "config.yaml").write_text("student: {interpolate_antialias: false, interpolate_offset: 0.1}")
    of_run = convert(place / "teacher_checkpoint.pth", num_heads=4)
    assert of_run.positions == PositionRule(antialias=False, offset=0.1)
    assert not any("config.yaml" in note for note in ConversionReport.of(of_run).notes)
    (tmp_path / "config.yaml").write_text("student: [")
    with pytest.raises(ConversionError, match=r"config\.yaml cannot be read"):
        convert(place / "teacher_checkpoint.pth", num_heads=4)


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


SIDES = {"height": 36, "width": 36}
PROCESSORS = {
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "DeiTImageProcessor": {"size": SIDES, "crop_size": {"height": 32, "width": 32}},
    "CLIPImageProcessor": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "DeiTImageProcessor, no normalisation": {
        "size": SIDES,
        "crop_size": {"height": 32, "width": 32},
        "do_normalize": False,
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_image_processor(name, tmp_path):
    processor = getattr(transformers, name.partition(",")[0])(**PROCESSORS[name])
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=48
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    converted = convert(tmp_path)
    image = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 600, 300))  # whole pixels after every resize
    transform = timm.data.create_transform(**timm.data.resolve_data_config(converted.to_json()["pretrained_cfg"]))
    ours, theirs = transform(image), processor(image, return_tensors="pt").pixel_values[0]
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().mean() < 0.03  # resizing by pillow and by torch differs a little


PEAK = """
import sys, timm, torch
from pathlib import Path
from vitreg_hub.conversion import convert

def peak():
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])

Path("/proc/self/clear_refs").write_text("5")
before = peak()
convert(sys.argv[1], sys.argv[2], license="unknown")
print(peak() - before)
"""


@pytest.mark.usefixtures("warm")
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
    for word in (
        *FORMATS,
        "--arch",
        "--img-size",
        "--registers",
        "--verify",
        "--text-tower",
        "--num-heads",
        "--act",
        "--license",
    ):
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
            "--license",
            "mit",
        ]
    )
    printed = capsys.readouterr().out
    assert "difference   0 in tokens, to timm" in printed
    assert "license      mit\n" in printed
    assert "4x4 patches were resampled to 6x3" in printed
    assert ModelBundle.load(folder).preprocess.input_size == (3, 84, 42)
    main(["convert", str(source("dinov2_reg4")), str(tmp_path / "reg"), "--num-heads", "4", *NO_LICENSE])
    main(["export", str(tmp_path / "reg"), str(tmp_path / "hf"), "--format", "hf-dinov2-with-registers"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_register_tokens"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.pth", "out"], "nowhere.pth is neither a file nor a folder"),
        ([str(source("hf_vit") / "config.json"), "out"], "config.json holds no weights: give the folder"),
        ([str(source("dinov2_reg4")), "out"], "give --num-heads"),
        ([str(source("dinov2_reg4")), "out", "--num-heads", "4"], "give it with --license"),
        ([str(source("dinov2_reg4")), "out", "--num-heads", "4", "--license", "apache2"], "did you mean apache-2.0?"),
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
