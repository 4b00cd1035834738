"""What a task brings: its settings and its class answer all that a run, its best model and its card ask."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from torch import nn
from training_runs import NO_PICTURES, TINY

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import DataError, RecipeError
from vitreg_hub.model_cards.card import render
from vitreg_hub.objectives import Objective, Score
from vitreg_hub.training.loop import train
from vitreg_hub.training.recipes.settings import WatchSettings
from vitreg_hub.training.tasks.base import StepOutput, Task
from vitreg_hub.training.tasks.settings import TaskSettings

EVENNESS = Score(name="evenness", words="evenness of tokens", task="image-feature-extraction", metric="evenness")


@dataclass(frozen=True, kw_only=True, slots=True)
class Even(TaskSettings):
    """All tokens are to be alike."""

    objective = Objective(words="evening out tokens", score=EVENNESS)
    task_class = f"{__name__}:EvenTask"
    needs = ("labels",)

    weight: float = 1.0

    def problems(self, *, batch_size: int) -> Iterator[str]:
        if self.weight <= 0:
            yield f"task.weight is {self.weight}, give more than 0."


class EvenNetwork(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images):
        return self.backbone.forward_features(images)


class EvenTask(Task):
    def __init__(self, settings, backbone, run):
        self.settings, self.network, self.frozen = settings, EvenNetwork(backbone), {}

    def training_step(self, network, batch):
        return StepOutput(loss=self.settings.weight * network(batch.crops[0]).std(1).mean(), metrics={})

    @property
    def published(self):
        return self.network

    def scorer(self, model):
        return lambda images, labels: {"evenness": -model(images).std(1).mean(1)}


RECIPE = replace(TINY["supervised"], name="even", task=Even(), watch=WatchSettings(artifact_images=0, eval_images=16))


def test_a_task_of_its_own_is_trained_compared_and_told(tmp_path):
    result = train(RECIPE, tmp_path / "run", instruments=NO_PICTURES)
    assert result.best.name == "evenness"
    assert result.best.score == result.metrics["eval/evenness"]
    card = render(ModelBundle.load(result.model))
    assert "- Objective: evening out tokens." in card
    assert f"| evenness of tokens | {result.best.score:.4f} |" in card


def test_a_task_refuses_its_own_settings():
    with pytest.raises(RecipeError, match=r"recipe even: task\.weight is 0, give more than 0"):
        replace(RECIPE, task=Even(weight=0))


def test_a_task_says_what_every_image_must_have(tmp_path):
    class Captioned(Even):
        needs = ("texts",)

    with pytest.raises(DataError, match="digits has no texts, which this task needs"):
        train(replace(RECIPE, task=Captioned()), tmp_path / "run", instruments=NO_PICTURES)
