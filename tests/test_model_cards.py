"""Cards of models from training runs, read back by huggingface_hub."""

from dataclasses import asdict, replace

import pytest
from huggingface_hub import ModelCard
from models import random_bundle
from training_runs import TINY, lines

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import Provenance
from vitreg_hub.hub import _card
from vitreg_hub.model_cards.card import render
from vitreg_hub.training.loop import train

# Scores of each task as its evaluation names them, and what the Hub is told: task, kind of metric, value.
KNN = ("image-classification", "accuracy", 0.75)
SCORES = {
    "supervised": ({"knn_accuracy": 0.75, "accuracy": 0.5}, {KNN, ("image-classification", "accuracy", 0.5)}),
    "dinov2": ({"knn_accuracy": 0.75}, {KNN}),
    "contrastive": (
        {"zero_shot_accuracy": 0.5, "knn_accuracy": 0.75},
        {KNN, ("zero-shot-image-classification", "accuracy", 0.5)},
    ),
    "distill": (
        {"patch_cosine": 0.5, "knn_accuracy": 0.75},
        {KNN, ("image-feature-extraction", "cosine_similarity", 0.5)},
    ),
}


def bundle_of(recipe, *, metrics=None, step=9, **provenance) -> ModelBundle:
    """A bundle as a run of a recipe of 9 steps leaves it, with random weights."""
    told = Provenance(
        origin="trained",
        dataset=recipe.data.train,
        metrics=metrics or {},
        settings=asdict(recipe) | {"step": step, "total_steps": 9},
        **provenance,
    )
    return replace(random_bundle("vit_nano_reg2"), provenance=told)


def training_section(card: str) -> str:
    return card.partition("\n## Training\n\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("task", SCORES)
def test_scores_of_every_task_are_told_in_words_and_to_the_hub(task):
    metrics, told = SCORES[task]
    card = render(bundle_of(TINY[task], metrics=metrics))
    results = ModelCard(card).data.eval_results
    assert {(result.task_type, result.metric_type, result.metric_value) for result in results} == told
    assert {result.dataset_name for result in results} == {TINY[task].data.train}
    measured = card.partition("**Measured:** ")[2].partition("\n")[0]
    assert "k-NN accuracy 0.7500" in measured
    assert len(measured.split(", ")) == len(metrics)
    assert "_" not in measured


@pytest.mark.parametrize("task", SCORES)
def test_card_is_the_same_from_memory_and_from_the_disk(task, tmp_path):
    bundle = bundle_of(TINY[task], metrics=SCORES[task][0])
    folder = bundle.save(tmp_path / "model", card=render(bundle))
    assert render(ModelBundle.load(folder)) == render(bundle)
    assert "your-name" not in _card(folder, "lab/model")  # so that `push` puts the real name in


def test_training_section_says_what_was_done():
    recipe = TINY["dinov2"]
    recipe = replace(
        recipe,
        batch_size=2048,
        seed=3,
        data=replace(recipe.data, test="org/held-out:test"),
        model=replace(recipe.model, start="vit_nano_reg4.digits", trainable="registers+norms"),
        optim=replace(recipe.optim, opt="adamw", lr=4e-3, lr_batch=1024, weight_decay=0.04, weight_decay_end=0.2),
    )
    section = training_section(render(bundle_of(recipe, metrics={"knn_accuracy": 0.5})))
    assert section.splitlines() == [
        "- Recipe `tiny_dinov2`: 9 steps of 2,048 images, seed 3.",
        "- Data: digits.",
        "- Started from vit_nano_reg4.digits; trained: registers and norms.",
        "- Optimiser: adamw, peak learning rate 0.004 for 1,024 images, scaled by the square root of the batch size; "
        "weight decay 0.04 to 0.2.",
        "- Measured on org/held-out:test, at most 32 images.",
    ]


def test_nothing_is_claimed_that_was_not_measured_or_done():
    card = render(bundle_of(TINY["supervised"], step=4))
    section = training_section(card)
    assert "**4 of 9 steps, not finished**" in section
    assert "Started" not in section
    assert "scaled" not in section
    assert "Measured" not in section
    assert "**Measured:** not measured" in card
    assert ModelCard(card).data.eval_results is None
    assert "## Training" not in render(random_bundle())


def test_scores_of_other_data_are_not_told_as_scores_of_the_training_data():
    recipe = replace(TINY["supervised"], data=replace(TINY["supervised"].data, test="org/held-out"))
    (result,) = ModelCard(render(bundle_of(recipe, metrics={"accuracy": 0.5}))).data.eval_results
    assert result.dataset_name == "org/held-out"


def test_card_of_a_real_run_tells_its_last_evaluation(tmp_path):
    train(TINY["distill"], tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    last = lines(tmp_path / "run")[-1]
    told = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert told["patch cosine to the teacher"] == last["eval/patch_cosine"]
    assert told["k-NN accuracy"] == last["eval/knn_accuracy"]
    assert "- Recipe `tiny_distill`: 4 steps of 8 images, seed 0.\n- Data: digits.\n" in training_section(card)
