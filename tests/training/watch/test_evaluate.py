"""Evaluation of a model in training: k-NN as scikit-learn does it, scores over all images, and nothing changed."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from models import TINY, randomised
from processes import run_in_two
from sklearn.neighbors import KNeighborsClassifier
from timm.data import create_transform
from torch import distributed
from torch.nn.functional import normalize

from vitreg_hub.analysis.telemetry import telemetry
from vitreg_hub.evaluation.knn import knn_votes
from vitreg_hub.images.embedded import digits
from vitreg_hub.images.source import open_images
from vitreg_hub.training.recipes.settings import WatchSettings
from vitreg_hub.training.watch.evaluate import EVALUATED_IMAGES, evaluate

SETTINGS = WatchSettings(eval_images=30, artifact_images=4)
CPU = torch.device("cpu")


def made(arch="vit_nano_reg4", **kwargs):
    model = randomised(timm.create_model(arch, num_classes=0, **({"depth": 2} | kwargs)))
    return model, create_transform((3, *model.patch_embed.img_size))


@cache
def pictures(split):
    return digits(split)


def sources():
    train = open_images(pictures("train"), max_images=90)
    return {"held_out": open_images(pictures("test"), max_images=80), "train": train}


def run(model, transform, scorer=None, settings=SETTINGS, **changes):
    return evaluate(
        model,
        scorer,
        **(sources() | {"transform": transform, "device": CPU, "settings": settings, "seed": 3} | changes),
    )


def sklearn_knn(neighbors, temperature):
    def votes(distances):
        return np.exp((1 - distances) / temperature)

    return KNeighborsClassifier(neighbors, weights=votes, metric="cosine", algorithm="brute")


def knn_classes(queries, *, train, labels, neighbors, temperature):
    [votes] = knn_votes(train, labels, queries, num_classes=7, ks=(neighbors,), temperature=temperature).values()
    return votes.argmax(dim=1)


@pytest.mark.parametrize(("neighbors", "temperature"), [(20, 0.07), (5, 0.5), (1, 0.07), (300, 0.02)])
def test_votes_are_those_of_scikit_learn(neighbors, temperature):
    generator = torch.Generator().manual_seed(neighbors)
    centres = torch.randn(7, 12, generator=generator)
    labels = torch.randint(0, 7, (1800,), generator=generator)
    features = normalize(centres[labels] + 1.5 * torch.randn(1800, 12, generator=generator), dim=1)
    train, held_out = features[:300], features[300:]  # more of these than are compared at once
    known = labels[:300].clone()
    ours = knn_classes(held_out, train=train, labels=known, neighbors=neighbors, temperature=temperature)
    oracle = sklearn_knn(neighbors, temperature).fit(train.double(), known)
    assert ours.tolist() == oracle.predict(held_out.double()).tolist()
    assert 0.3 < (ours == labels[300:]).double().mean() < 0.95  # some right, some wrong


def test_more_neighbours_than_images_are_all_of_them():
    features, labels = normalize(torch.randn(9, 4), dim=1), torch.tensor([0, 1, 2] * 3)
    both = [knn_classes(features, train=features, labels=labels, neighbors=k, temperature=1.0) for k in (9, 50)]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("vit_nano_reg4", {}),
        ("vit_nano_reg0", {}),
        ("vit_tiny_reg0_deit_distilled", TINY | {"img_size": 32}),
        ("vit_base_reg4_clip", TINY | {"img_size": 32}),
    ],
)
def test_accuracy_is_that_of_timms_class_tokens_under_scikit_learn(arch, kwargs):
    model, transform = made(arch, **kwargs)
    settings = replace(SETTINGS, eval_images=1000)
    found = run(model, transform, settings=settings)
    features, labels = {}, {}
    for name, source in sources().items():
        (batch,) = source.batches(transform, batch_size=1000)
        with torch.no_grad():
            features[name] = normalize(model.forward_features(batch.images)[:, 0], dim=1).double()
        labels[name] = batch.labels
    oracle = sklearn_knn(20, 0.07).fit(features["train"], labels["train"])
    assert found["eval/knn_accuracy"] == oracle.score(features["held_out"], labels["held_out"])
    assert 0.2 < found["eval/knn_accuracy"] < 1


def test_scores_are_means_over_the_images_that_have_them():
    model, transform = made()

    def scorer(images, labels):
        even = torch.where(labels % 2 == 0, labels.float(), torch.nan)
        return {"label": labels, "even": even, "none": torch.full(labels.shape, torch.nan), "left": images[:, 0, 5, 5]}

    held_out = sources()["held_out"]
    found = run(model, transform, scorer, settings=replace(SETTINGS, eval_images=1000), train=None)
    (batch,) = held_out.batches(transform, batch_size=1000)
    even = batch.labels[batch.labels % 2 == 0]
    assert found["eval/label"] == batch.labels.double().mean().item()
    assert found["eval/even"] == even.double().mean().item()
    assert found["eval/left"] == pytest.approx(batch.images[:, 0, 5, 5].double().mean().item(), rel=1e-12)
    assert not {"eval/none", "eval/knn_accuracy"} & found.keys()


def test_artifacts_are_the_telemetry_of_some_held_out_images():
    model, transform = made()
    held_out = open_images(pictures("test").select(range(4)))
    (batch,) = held_out.batches(transform, batch_size=4)
    settings = replace(SETTINGS, cutoff=1.0)
    found = run(model, transform, settings=settings, held_out=held_out)
    expected = telemetry(model, batch.images, cutoff=1.0).scalars()
    assert expected == {name: value for name, value in found.items() if name.startswith("artifacts/")}
    none = run(model, transform, settings=replace(settings, artifact_images=0), held_out=held_out)
    assert none.keys() == found.keys() - expected.keys() != set()


def test_without_labels_nothing_is_classified():
    model, transform = made()
    unlabelled = open_images(pictures("test").remove_columns("label"))
    seen = []

    def scorer(images, labels):
        seen.append(labels)
        return {"brightness": images.mean(dim=(1, 2, 3))}

    found = run(model, transform, scorer, held_out=unlabelled)
    assert {name for name in found if not name.startswith("artifacts/")} == {"eval/brightness", EVALUATED_IMAGES}
    assert torch.cat(seen).tolist() == [-1] * 30
    assert found[EVALUATED_IMAGES] == 30


def test_the_images_that_were_scored_are_counted_not_those_that_were_asked_for():
    model, transform = made()
    settings = replace(SETTINGS, eval_images=2048)
    assert run(model, transform, settings=settings)[EVALUATED_IMAGES] == 80
    assert EVALUATED_IMAGES not in run(model, transform, settings=settings, train=None)  # without a score


def test_images_are_a_seeded_choice_and_each_is_seen_once():
    model, transform = made()

    def sums_of_images(seed, **changes):
        seen = []

        def scorer(images, labels):
            seen.extend(images.flatten(1).double().sum(1).tolist())
            return {}

        run(model, transform, scorer, train=None, seed=seed, **changes)
        return seen

    first = sums_of_images(0)
    assert len(first) == 30
    assert first == sums_of_images(0)
    assert first != sums_of_images(1)
    stream = open_images(pictures("test").to_iterable_dataset())
    first_thirty = open_images(pictures("test").select(range(30)))
    assert sums_of_images(0, held_out=stream) == sums_of_images(0, held_out=first_thirty)


def test_evaluation_changes_nothing():
    model, transform = made()
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    found = run(model, transform, lambda images, labels: {"score": labels})
    assert (torch.get_rng_state().equal(states[0]), random.getstate()) == (True, states[1])
    assert str(np.random.get_state()) == states[2]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found == run(model.eval(), transform, lambda images, labels: {"score": labels})


def logits_scorer(model):
    def scorer(images, labels):
        return {"correct": (model(images).argmax(1) % 10 == labels).float(), "norm": model(images).norm(dim=1)}

    return scorer


def two_processes(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, transform = made()
    changes = {"rank": rank, "world_size": 2, "batch_size": 16, "num_workers": 0}
    found = run(model, transform, logits_scorer(model), settings=replace(SETTINGS, eval_images=31), **changes)
    torch.save(found, f"{folder}/{rank}.pt")
    # one that only the second process reads is broken, and left out
    found = run(model, transform, held_out=open_images(f"{folder}/broken"), **changes)
    torch.save(found, f"{folder}/broken{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    for number in range(4):
        for name in "ab":
            file = tmp_path / "broken" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pictures("test")[number]["image"].save(file)
    (tmp_path / "broken" / "a" / "3.png").write_bytes(b"no picture")
    run_in_two(two_processes, str(tmp_path))
    model, transform = made()
    settings = replace(SETTINGS, eval_images=31)  # an odd number: the second process has one image fewer
    alone = run(model, transform, logits_scorer(model), settings=settings, batch_size=16)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(alone, rel=1e-6, abs=0)
        assert found["eval/knn_accuracy"] == alone["eval/knn_accuracy"]
        assert found[EVALUATED_IMAGES] == 31
        assert torch.load(tmp_path / f"broken{rank}.pt")["eval/knn_accuracy"] in {
            i / 7 for i in range(8)
        }  # of 8 images
        assert torch.load(tmp_path / f"broken{rank}.pt")[EVALUATED_IMAGES] == 7
