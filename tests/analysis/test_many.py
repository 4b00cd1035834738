"""`vitreg analyze` and `vitreg attention`: what they write, what they print, what they refuse."""

import dataclasses
import json
import re

import pytest
import timm
import torch
from models import TINY, random_bundle
from PIL import Image
from reports import report as synthetic_report
from skimage import data

from vitreg_hub.analysis.many import analyze_all, expand
from vitreg_hub.analysis.measures import patch_norms
from vitreg_hub.analysis.report.write import draw_attention
from vitreg_hub.analysis.results import load_reports
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Foreign
from vitreg_hub.cli import main
from vitreg_hub.errors import DataError, VitregError
from vitreg_hub.images.embedded import digits
from vitreg_hub.model_cards.artifacts import record
from vitreg_hub.model_cards.card import render
from vitreg_hub.pages.content import REPORT_JSON, REPORT_PAGE


@pytest.fixture
def bundles(tmp_path):
    """Folders of three models: without registers, with one, and with four."""
    folders = []
    for number in (0, 1, 4):
        arch = f"vit_nano_reg{number}"
        folders.append(random_bundle(arch).save(tmp_path / arch))
    return folders


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()).save(file)
    return file


def test_models_side_by_side(bundles, tmp_path, capsys):
    out = tmp_path / "report"
    main(["analyze", *map(str, bundles), "--images", "digits", "--max-images", "40", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("No outliers: in no block") == 3
    assert "2,560 patches were seen; below 50,000" in printed
    assert printed.rstrip().endswith(f"report   {out / REPORT_PAGE}")
    reports = load_reports(out / REPORT_JSON)
    assert [report.model.num_registers for report in reports] == [0, 1, 4]
    assert [report.model.name for report in reports] == [str(folder) for folder in bundles]
    assert {report.images.num_images for report in reports} == {40}
    page = (out / REPORT_PAGE).read_text()
    figures = {path.stem for path in out.glob("*.png")}
    assert {"comparison", "norms_by_block", "attention_mass", "examples_1", "examples_2", "examples_3"} <= figures
    assert page.count("<img") == len(figures)
    assert {path.name for path in out.iterdir()} == {REPORT_JSON, REPORT_PAGE, *(f"{name}.png" for name in figures)}
    for figure in out.glob("*.png"):
        with Image.open(figure) as opened:
            opened.load()
            assert opened.width > 300


def test_default_images_ship_with_the_package(tmp_path):
    main(["analyze", "vit_nano_reg4", "--out", str(tmp_path / "report")])
    (report,) = load_reports(tmp_path / "report" / REPORT_JSON)
    assert report.images.name == "photos"
    assert report.images.num_images > 200
    accuracy = {token.token: token.accuracy for token in report.global_information.tokens}
    assert accuracy["class"] > accuracy["normal patch"] > report.global_information.chance


def test_options_reach_the_analysis(tmp_path):
    out = tmp_path / "report"
    options = (
        "--images digits --max-images 12 --cutoff 0.001 --block -2 --img-size 48,32 --batch-size 5 --dtype bfloat16"
    )
    main(["analyze", "vit_nano_reg4", *options.split(), "--out", str(out)])
    (report,) = load_reports(out / REPORT_JSON)
    assert report.outlier_fraction == (1, 1, 1, 1)
    assert report.block == 2
    assert (report.images.size, report.images.grid) == ((48, 32), (12, 8))
    assert report.cutoff == (0.001,) * 4
    same = {"max_images": 12, "cutoff": 0.001, "img_size": (48, 32), "batch_size": 5}
    assert patch_norms("vit_nano_reg4", "digits", dtype=torch.bfloat16, **same) == report.blocks
    assert patch_norms("vit_nano_reg4", "digits", dtype=torch.float32, **same) != report.blocks


def test_checkpoints_of_a_run_are_ordered_by_step(tmp_path):
    few = digits("test").select(range(12))
    for step in (1000, 50, 200):
        random_bundle("vit_nano_reg4").save(tmp_path / "run" / f"step_{step}" / "model")
    reports = analyze_all([tmp_path / "run", "vit_nano_reg0"], few, num_examples=1)
    assert [report.model.step for report in reports] == [50, 200, 1000, None]
    assert [step for _, step in expand(str(tmp_path / "run"))] == [50, 200, 1000]
    (tmp_path / "empty" / "step_1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds neither a model \(config\.json\) nor checkpoints"):
        list(expand(tmp_path / "empty"))


def test_the_step_of_a_checkpoint_is_the_last_number_below_the_run(tmp_path):
    run = tmp_path / "run_7"
    for folder in ("try_3/step_50", "step_200/model", "last"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text("{}")
    assert list(expand(run)) == [(run / "try_3/step_50", 50), (run / "step_200/model", 200)]


def test_models_of_a_run_without_a_step_are_left_out_and_named(tmp_path, caplog):
    for folder in ("checkpoint-20", "best", "vit_nano_reg4", "000300"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    with caplog.at_level("INFO", logger="vitreg_hub"):
        assert [step for _, step in expand(tmp_path)] == [20, 300]
    assert f"{tmp_path / 'best'}, {tmp_path / 'vit_nano_reg4'}" in caplog.text


@pytest.mark.parametrize("last", ["vit_nano_reg5", "vit_nano_reg4.tag", "report.json"])
def test_a_mistake_in_the_last_model_shows_before_the_first_is_analyzed(last):
    with pytest.raises(VitregError, match=last.partition(".")[0]):  # and not that there are no such images
        analyze_all(["vit_nano_reg4", last], "nowhere")


def test_earlier_reports_stand_beside_new_ones(bundles, tmp_path, capsys):
    first, both = tmp_path / "first", tmp_path / "both"
    main(["analyze", str(bundles[0]), "--images", "digits", "--max-images", "12", "--out", str(first)])
    (report,) = load_reports(first / REPORT_JSON)
    arguments = [str(first / REPORT_JSON), str(bundles[2]), "--images", "digits", "--max-images", "12"]
    main(["analyze", *arguments, "--out", str(both)])
    assert load_reports(both / REPORT_JSON)[0] == report
    assert not (both / "examples_1.png").exists()
    assert (both / "examples_2.png").exists()


def test_the_result_goes_into_bundle_and_card(bundles, tmp_path, capsys):
    folder, other = bundles[2], bundles[1]
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "README.md").write_text(render(ModelBundle.load(folder)))
    arguments = ["--images", "digits", "--max-images", "20", "--card"]
    main(["analyze", str(folder), str(other), *arguments, "--out", str(tmp_path / "report")])
    assert capsys.readouterr().out.count("recorded in the bundle and its card") == 2
    report, _ = load_reports(tmp_path / "report" / REPORT_JSON)
    attention = ModelBundle.load(other).provenance.artifacts.attention
    assert [mass.source for mass in attention] == ["class", "register 1"]
    card = (folder / "README.md").read_text()
    assert "## Artifacts" in card
    assert "20 images of 32 x 32 pixels (digits)" in card
    shares = re.search(r"Attention of class in block 3: (\S+) % on registers", card)[1]
    assert float(shares) == pytest.approx(100 * report.attention[0].to_registers, rel=0.01)
    kept = ModelBundle.load(folder)
    assert kept.provenance.artifacts.outlier_fraction == (0, 0, 0, 0)
    assert render(kept, files=["artifacts.png"]) == card
    assert (folder / "model.safetensors").read_bytes() == weights
    timm.create_model(f"local-dir:{folder}", pretrained=True)

    (folder / "README.md").write_text("# mine")
    main(["analyze", str(folder), *arguments, "--out", str(tmp_path / "again")])
    assert "its card is an author's" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "# mine"


def test_a_card_tells_what_was_measured(bundles, tmp_path):
    folder, images = bundles[2], tmp_path / "my photos"
    images.mkdir()
    bundle = ModelBundle.load(folder)
    origin = dataclasses.replace(bundle.provenance, made=Foreign(settings={"epochs": 3}))
    folder = dataclasses.replace(bundle, provenance=origin).save(tmp_path / "trained")
    found = synthetic_report(registers=4, grid=(16, 12))
    found = dataclasses.replace(found, block=8, images=dataclasses.replace(found.images, name=str(images)))
    assert record(folder, found)
    assert record(folder, found)  # its own card is still not an author's
    told = ModelBundle.load(folder).provenance
    assert told.made.settings["epochs"] == 3
    assert told.artifacts.cutoff == found.blocks[8].cutoff.value != found.blocks[-1].cutoff.value
    card = (folder / "README.md").read_text()
    assert "Measured on 64 images of 224 x 168 pixels (my photos)." in card
    assert str(tmp_path) not in card
    assert f"block by block: {', '.join(f'{100 * share:.3g} %' for share in found.outlier_fraction)}." in card
    assert "- Attention of register 4 in block 8: 25 % on registers, 30 % on outliers." in card
    assert "- Numbers are random.\n- Images of one size only." in card


def test_attention_of_pictures(picture, bundles, tmp_path, capsys):
    def drawn(*arguments: str) -> Image.Image:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        main(["attention", str(bundles[2]), str(picture), *arguments, "--out", str(out)])
        assert capsys.readouterr().out.strip() == str(out)
        return Image.open(out).convert("RGB")

    one, two, heads, first = drawn(), drawn(str(picture)), drawn("--heads"), drawn("--block", "0")
    assert one.width > 600
    assert len(one.getcolors(one.width * one.height)) > 300  # pictures, not blank paper
    assert two.height > 1.5 * one.height
    assert heads.height > 1.5 * one.height
    assert first.tobytes() != one.tobytes() == drawn("--block", "-1").tobytes()


def test_attention_needs_a_class_token_or_registers(picture, tmp_path):
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=64, **TINY)
    with pytest.raises(DataError, match="neither class token nor registers"):
        draw_attention(model, [picture], tmp_path / "maps.png")
    assert not (tmp_path / "maps.png").exists()


MISTAKES = {
    "there is no folder and no architecture 'vit_nano_reg5'; closest: vit_nano_reg": ["analyze", "vit_nano_reg5"],
    "there are no images 'digit', did you mean 'digits'": ["analyze", "vit_nano_reg4", "--images", "digit"],
    "ResNet cannot be read: timm's VisionTransformer": ["analyze", "resnet50t"],
    "block 4 does not exist": ["analyze", "vit_nano_reg4", "--block", "4", "--max-images", "4"],
    "{tmp} exists: choose another folder": ["analyze", "vit_nano_reg4", "--out", "{tmp}"],
    "--card records results in bundles' folders, but vit_nano_reg4 is none": ["analyze", "vit_nano_reg4", "--card"],
    "--img-size takes a side": ["analyze", "vit_nano_reg4", "--img-size", "big"],
    "max_images is -1": ["analyze", "vit_nano_reg4", "--max-images", "-1"],
    "{tmp}/report.json is not a report of `vitreg analyze`": ["analyze", "{tmp}/report.json"],
    "{tmp}/cat.png cannot be read as an image": ["attention", "vit_nano_reg4", "{tmp}/cat.png"],
    "maps.jpg does not end in .png": ["attention", "vit_nano_reg4", "{tmp}/cat.png", "--out", "maps.jpg"],
    "batch_size is 0": ["analyze", "vit_nano_reg4", "--batch-size", "0"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_end_in_one_sentence_and_leave_nothing(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main([argument.format(tmp=tmp_path) for argument in MISTAKES[message]])
    assert str(done.value.code).startswith(f"vitreg: {message.format(tmp=tmp_path)}")
    assert "\n" not in str(done.value.code)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_no_half_report(bundles, tmp_path):
    (bundles[1] / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit):
        main(["analyze", *map(str, bundles), "--images", "digits", "--max-images", "4", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_report_json_is_plain(tmp_path):
    out = tmp_path / "report"
    main(["analyze", "vit_nano_reg0", "--images", "digits", "--max-images", "12", "--out", str(out)])
    text = (out / REPORT_JSON).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
