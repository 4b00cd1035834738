"""Linear probes and logistic regression against DINOv3's, and where the outcome is known."""

from dataclasses import replace

import pytest
import torch
from checkpoints import GOLDEN, convert
from recorded import expected, inputs
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import one_hot

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.features import Features, extract
from vitreg_hub.evaluation.linear import (
    LinearSettings,
    Probe,
    accuracies,
    all_logits,
    best_probe,
    new_heads,
    random_batches,
    train_heads,
)
from vitreg_hub.evaluation.logreg import STRENGTHS, fit_logistic, held_back
from vitreg_hub.images.source import open_images

RATES = (0.01, 0.1)
PROBES = tuple(Probe(pool="class+patches", blocks=n, rate=rate) for n in (1, 4) for rate in RATES)


def name_of(probe: Probe) -> str:
    return f"classifier_{probe.blocks}_blocks_avgpool_True_lr_{probe.rate * 8 / 256:.5f}".replace(".", "_")


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    tensors = load_file(GOLDEN / "eval_linear" / "checkpoint.safetensors")
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(backbone, path)
    model = convert(path, num_heads=2).build()
    found = extract(model, open_images(inputs("eval_linear")["images"]).batches(None, batch_size=7))
    labels = inputs("eval_linear")["labels"]
    return replace(found, labels=labels)


def test_features_are_the_recorded_ones(features):
    for blocks in (1, 4):
        for pool, average in (("class", False), ("class+patches", True)):
            wanted = expected("eval_linear")[f"features.n{blocks}.avgpool_{average}"]
            assert (features.pooled(pool, blocks=blocks) - wanted).abs().max() < 2e-5


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "cosine"), ("adamw", "one_cycle")])
def test_training_is_the_recorded_one(features, optimizer, schedule):
    given, wanted = inputs("eval_linear"), expected("eval_linear")
    heads = new_heads(features, PROBES, num_classes=6)
    for probe, head in heads.items():
        head.weight.data.copy_(given[f"{optimizer}.init.{name_of(probe)}.weight"])
    batches = [features[torch.arange(8 * step, 8 * step + 8) % 20] for step in range(8)]
    settings = LinearSettings(batch_size=8, optimizer=optimizer, schedule=schedule)
    losses = train_heads(heads, batches, steps=8, settings=settings)
    assert (losses - wanted[f"{optimizer}.losses"]).abs().max() < 1e-5
    for probe, logits in all_logits(heads, features).items():
        assert (heads[probe].weight - wanted[f"{optimizer}.final.{name_of(probe)}.weight"]).abs().max() < 1e-5
        assert (logits - wanted[f"{optimizer}.final_logits.{name_of(probe)}"]).abs().max() < 1e-5


def planted(number=200, num_classes=4):
    """Features whose registers hold the class, and nothing else does."""
    labels = torch.arange(number) % num_classes
    noise = torch.randn(number, 6, 8)
    registers = one_hot(labels, 8).float()[:, None] + 0.01 * noise[:, :1]
    return Features(
        indices=torch.arange(number),
        labels=labels,
        cls=noise[:, 1:5],
        patches=noise[:, 5],
        registers=registers,
        logits=torch.empty(number, 0),
    )


def test_the_probe_that_reads_what_holds_the_class_is_best():
    train, test = planted(), planted(number=100)
    settings = LinearSettings(rates=(0.01, 0.1), batch_size=32)
    heads = new_heads(train, settings.grid(train), num_classes=4)
    steps = settings.steps_for(len(train))
    train_heads(heads, random_batches(train, batch_size=32, steps=steps), steps=steps, settings=settings)
    scores = accuracies(heads, test)
    best = best_probe(scores)
    assert best.pool == "class+registers"
    assert scores[best] == 1
    assert max(score for probe, score in scores.items() if probe.pool != "class+registers") < 0.5
    assert len(heads) == 2 * 3 * 2


def test_every_image_comes_once_in_each_pass():
    batches = list(random_batches(planted(number=10), batch_size=4, steps=5))
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == sorted([*range(10)] * 2)


def test_logistic_regression_is_the_recorded_one():
    given, wanted = inputs("eval_logreg"), expected("eval_logreg")
    fit = fit_logistic(given["train_features"], given["train_labels"], given["val_features"], given["val_labels"])
    assert torch.allclose(torch.tensor(STRENGTHS), wanted["C_grid"])
    assert fit.strength == pytest.approx(wanted["best_C"].item())
    found = torch.tensor(list(fit.held_out_accuracy.values()))
    assert torch.allclose(found, wanted["val_top1_per_C"])
    probabilities = fit.probabilities(given["test_features"], num_classes=5)
    assert (probabilities - wanted["final.test_probas"]).abs().max() < 1e-5


def test_a_class_that_was_not_trained_gets_nothing():
    labels = torch.tensor([0, 2] * 10)
    features = one_hot(labels, 3).float()
    fit = fit_logistic(features, labels, features, labels, strengths=(1.0,))
    probabilities = fit.probabilities(features, num_classes=4)
    assert probabilities[:, [1, 3]].max() == 0
    assert torch.equal(probabilities.argmax(dim=1), labels)
    with pytest.raises(DataError, match="at least two classes"):
        fit_logistic(features, torch.zeros(20), features, labels)


def test_a_share_of_each_class_is_kept_back():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2])
    fits, kept_back = held_back(labels)
    assert sorted([*fits.tolist(), *kept_back.tolist()]) == list(range(71))
    assert labels[kept_back].bincount(minlength=3).tolist() == [5, 2, 0]


def test_features_of_a_model_without_the_tokens_are_refused():
    without = planted(number=4)
    bare = replace(without, cls=without.cls[:, :0], registers=without.registers[:, :0])
    assert bare.pools == ("patches",)
    assert LinearSettings().grid(bare)[0].pool == "patches"
    with pytest.raises(DataError, match="choose from patches"):
        bare.pooled("class")
    assert isinstance(new_heads(bare, LinearSettings().grid(bare), num_classes=2).popitem()[1], nn.Linear)
