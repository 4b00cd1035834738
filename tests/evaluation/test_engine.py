"""Protocols on whole models: what is scored, by whom it can be compared, and what chance scores."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from models import random_bundle
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation import DenseSettings, LinearSettings, Settings, evaluate
from vitreg_hub.evaluation.labels import match
from vitreg_hub.evaluation.results import load_reports, to_json

TRAINED = "vit_nano_reg4.digits"
QUICK = Settings(
    ks=(5, 20),
    linear=LinearSettings(rates=(0.01, 0.1), steps=200),
    dense=DenseSettings(steps=3),
)


@pytest.fixture(scope="module")
def report():
    return evaluate(TRAINED, ("classify", "knn", "linear"), settings=QUICK, max_images=600)


def test_a_trained_model_is_scored_as_it_deserves(report):
    for protocol, least in (("classify", 0.95), ("knn", 0.95), ("linear", 0.9)):
        top1 = report.result(protocol).scores[0]
        assert top1.name == "top-1"
        assert least < top1.value <= 1
        assert top1.low < top1.value <= top1.high
    confusion = np.array(report.result("classify").confusion)
    assert confusion.sum() == report.result("classify").test.num_images == 359
    assert np.trace(confusion) / 359 == pytest.approx(report.result("classify").scores[0].value)
    assert report.result("classify").settings["classes"] == "by name"


def test_registers_are_changed_and_read(report):
    knn = report.result("knn")
    assert set(knn.interventions) == {"zeroed", "mean", "shuffled"}
    by_name = {kind: {score.name: score.value for score in scores} for kind, scores in knn.interventions.items()}
    before = {score.name: score.value for score in knn.scores}
    assert before["registers, 5 neighbours"] > 0.5
    for kind in ("zeroed", "mean"):  # the same for every image
        assert by_name[kind]["registers, 5 neighbours"] < 0.3
    assert by_name["shuffled"]["registers, 5 neighbours"] < 0.3  # another image's
    plain = evaluate("vit_nano_reg0.digits", "knn", settings=QUICK, max_images=100)
    assert plain.result("knn").interventions == {}


def test_scores_do_not_depend_on_batches(report):
    other = evaluate(TRAINED, ("classify", "knn"), settings=QUICK, max_images=600, batch_size=7)
    for protocol in ("classify", "knn"):
        here, there = report.result(protocol), other.result(protocol)
        assert here.digest == there.digest
        for score, same in zip(here.scores, there.scores, strict=True):
            assert score.value == pytest.approx(same.value, abs=1e-5)


def test_other_settings_have_another_digest(report):
    other = evaluate(TRAINED, "knn", settings=replace(QUICK, temperature=0.5), max_images=600)
    assert other.result("knn").digest != report.result("knn").digest


def test_a_random_network_and_permuted_labels_score_at_chance():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(400, 8, 8, 3, generator=generator).mul(255).byte().numpy()
    labels = torch.arange(400) % 4
    data = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in noise], "label": labels.tolist()},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abcd"))),
    )
    parts = {"train": data.select(range(200)), "test": data.select(range(200, 400))}
    found = evaluate(random_bundle(num_classes=4).build(), ("knn", "logreg", "classify"), **parts, settings=QUICK)
    for result in found.results:
        assert 0.1 < result.scores[0].value < 0.4


def test_dense_protocols_run_on_the_embedded_scenes():
    found = evaluate(TRAINED, ("segmentation", "depth", "discovery"), settings=QUICK, max_images=6)
    for protocol, unit in (("segmentation", "share"), ("depth", "m"), ("discovery", "share")):
        result = found.result(protocol)
        assert result.scores[0].unit == unit
        assert result.test.num_images == 6
        assert set(result.interventions) == {"zeroed", "mean", "shuffled"}
    assert found.result("segmentation").test.classes[0] == "background"
    assert len(found.result("segmentation").per_class) == 7


def test_what_cannot_be_scored_is_told(tmp_path):
    found = evaluate(TRAINED, settings=replace(QUICK, interventions=False, dense=DenseSettings(steps=1)), max_images=12)
    assert found.result("zero-shot") is None
    assert any("text tower" in note for note in found.notes)
    with pytest.raises(DataError, match="choose from classify"):
        evaluate(TRAINED, "k-nn")
    headless = random_bundle(num_classes=0).build()
    with pytest.raises(DataError, match="no head that tells classes"):
        evaluate(headless, "classify", max_images=5)
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="no labels"):
        evaluate(headless, "knn", test=tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"device": "nothing"}, "device 'nothing'"), ({"seed": -1}, "seed is -1"), ({"sed": 1}, "there is no option sed")],
)
def test_options_without_sense_are_refused(options, sentence):
    with pytest.raises(DataError, match=sentence):
        evaluate(TRAINED, "knn", max_images=5, **options)


def test_images_of_other_channels_are_refused():
    with pytest.raises(DataError, match="takes images of 5 channels"):
        evaluate(random_bundle().build(in_chans=5), "classify", max_images=5)


def test_changed_registers_are_scored_with_the_features_that_the_sweep_chose():
    swept = replace(QUICK, dense=DenseSettings(sweep=True))
    found = evaluate(TRAINED, "discovery", settings=swept, max_images=20).result("discovery")
    assert len(found.table) == 3 * 4 * 10
    best = max(found.table, key=found.table.get)
    for scores in (found.scores, *found.interventions.values()):
        assert scores[0].name == f"CorLoc, {best}"


def test_report_is_the_same_as_json(report, tmp_path):
    (tmp_path / "report.json").write_text(to_json([report]))
    assert load_reports(tmp_path / "report.json") == (report,)
    (tmp_path / "report.json").write_text('{"artifacts": 1}')
    with pytest.raises(DataError, match="is no report"):
        load_reports(tmp_path / "report.json")


def test_classes_match_by_name():
    assert match(("cat", "dog", "owl"), 3, ("Dog", "cat"), 2).places == (1, 0)
    assert match(("cat", "dog"), 2, ("dog", "fish"), 2).places == (1, -1)
    assert match((), 4, None, 4).places == (0, 1, 2, 3)
    assert match(("tench, Tinca tinca", "goldfish, Carassius auratus"), 2, ("n01443537",), 1).places == (1,)
    assert match(("n01440764", "n01443537"), 2, ("goldfish",), 1).places == (1,)
    with pytest.raises(DataError, match="classes such as 'cat'"):
        match(("cat",), 1, ("fish", "owl"), 2)


def test_a_classifier_of_transformers_keeps_its_head(tmp_path):
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        num_labels=10,
        id2label={number: str(number) for number in range(10)},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    found = evaluate(tmp_path / "vit", "classify", max_images=20)
    assert found.result("classify").settings["classes"] == "by name"
