"""Votes of neighbours against DINOv3's, and where their outcome is known."""

import pytest
import torch
from recorded import expected, inputs
from torch.nn.functional import normalize

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation import knn
from vitreg_hub.evaluation.knn import few_shot, knn_votes
from vitreg_hub.evaluation.scores import classification_scores

GIVEN, WANTED = inputs("eval_knn"), expected("eval_knn")
KS = (10, 20, 100, 200)


def votes_of(run: str, **options):
    given = {name: GIVEN[f"{run}.{name}"] for name in ("train_features", "train_labels", "test_features")}
    return knn_votes(given["train_features"], given["train_labels"], given["test_features"], num_classes=10, **options)


@pytest.mark.parametrize("run", ["full", "few_train"])
def test_votes_are_the_recorded_ones(run):
    votes = votes_of(run, ks=KS)
    assert set(votes) == ({10, 20, 70} if run == "few_train" else set(KS))
    for k, found in votes.items():
        assert (found - WANTED[f"{run}.k_{k}.probas"]).abs().max() < 1e-5
        assert torch.equal(found.argmax(dim=1), WANTED[f"{run}.k_{k}.prediction"])
        scores = classification_scores(found, GIVEN[f"{run}.test_labels"])
        assert 100 * scores.top1.value == pytest.approx(WANTED[f"{run}.k_{k}.top-1"].item(), abs=1e-4)
        assert 100 * scores.top5.value == pytest.approx(WANTED[f"{run}.k_{k}.top-5"].item(), abs=1e-4)
        assert 100 * scores.mean_per_class == pytest.approx(WANTED[f"{run}.k_{k}.per_class.top-1"].item(), abs=1e-4)


@pytest.mark.parametrize("run", ["full", "few_train"])
def test_an_image_does_not_vote_for_itself(run):
    train, labels = GIVEN[f"{run}.train_features"], GIVEN[f"{run}.train_labels"]
    votes = knn_votes(train, labels, train, num_classes=10, ks=(10, 20), skip_first=True)
    for k, found in votes.items():
        wanted = WANTED[f"{run}.skip_first.k_{k}.probas"]
        differ = (found - wanted).abs().amax(dim=1) > 1e-5
        assert differ.sum() <= 2  # recorded with equal similarities, whose order is free


def test_temperature_is_used():
    scores = classification_scores(votes_of("full", ks=(20,), temperature=0.5)[20], GIVEN["full.test_labels"])
    assert 100 * scores.top1.value == pytest.approx(WANTED["full.temperature_0.5.k_20.top-1"].item(), abs=1e-4)


@pytest.mark.parametrize(("name", "per_class"), [("n5", 5), ("percent10", 0.1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_few_shots_are_those_that_were_drawn(name, per_class, seed):
    chosen = few_shot(GIVEN["full.train_labels"], per_class=per_class, seed=seed)
    assert torch.equal(chosen, WANTED[f"fewshot.dinov3.{name}.seed{seed}.indices"])


def test_tiles_and_groups_change_nothing(monkeypatch):
    train, labels, queries = torch.randn(20_000, 8), torch.randint(5, (20_000,)), torch.randn(30, 8)
    products = normalize(queries, dim=1) @ normalize(train, dim=1).T
    nearest = products.topk(50)
    weights = (nearest.values / 0.07).softmax(dim=1)
    wanted = torch.zeros(30, 5).scatter_add_(1, labels[nearest.indices], weights)
    for tile, most in (
        (knn.TRAIN_TILE, knn.SIMILARITIES),
        (14_001, 14_001 * 7),
    ):  # groups of 64 in both, not in the rest
        monkeypatch.setattr(knn, "TRAIN_TILE", tile)
        monkeypatch.setattr(knn, "SIMILARITIES", most)
        votes = knn_votes(train, labels, queries, num_classes=5, ks=(50,))[50]
        assert (votes - wanted).abs().max() < 1e-5


def test_half_precision_is_near():
    train, labels = GIVEN["full.train_features"].half(), GIVEN["full.train_labels"]
    votes = knn_votes(train, labels, GIVEN["full.test_features"], num_classes=10, ks=(20,))[20]
    assert (votes - votes_of("full", ks=(20,))[20]).abs().max() < 0.02


def test_what_cannot_vote_is_refused():
    train, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 3])
    with pytest.raises(DataError, match="number 3 classes from 0"):
        knn_votes(train, labels, train, num_classes=3)
    with pytest.raises(DataError, match="at least one labelled feature"):
        knn_votes(train[:0], labels[:0], train, num_classes=3)
