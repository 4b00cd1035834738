"""What the evaluations of a run have found, which model was best, and how to make an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, VitregError
from vitreg_hub.training.recipes.settings import Recipe, WatchSettings
from vitreg_hub.training.run.assembly import vit_of
from vitreg_hub.training.run.folders import BEST
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.watch.evaluate import evaluate

AT_START = "start/"
"""Begins the name under which metrics hold the score that was measured before the first step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best model of a run so far; of equal ones the first."""

    name: str
    score: float
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the evaluations of a run have found so far.

    Attributes:
        step: Steps done at the last one; -1 before the first.
        best: The best model so far, if any evaluation gave a score.
        later_best: The best model of a killed process, found after the checkpoint that this one resumes from.
    """

    step: int = -1
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None
    later_best: Best | None = None

    @property
    def is_best(self) -> bool:
        """Whether the model of the last evaluation is the best one so far."""
        return self.best is not None and self.best.step == self.step

    def of(self, step: int) -> Mapping[str, float]:
        """The metrics of the weights of a step; empty if they were not evaluated."""
        return self.metrics if self.step == step else {}

    def start(self, recipe: Recipe) -> float | None:
        """The score before the first step, if it was measured."""
        return self.metrics.get(f"{AT_START}{score_of(recipe)}")

    def is_below_start(self, recipe: Recipe) -> bool:
        """Whether no model of the run is as good as what it began with."""
        start = self.start(recipe)
        return start is not None and self.best is not None and self.best.score < start

    def is_stalled(self, recipe: Recipe, *, every: int) -> bool:
        """Whether the run is to end early, because the best model is too many evaluations old."""
        patience = recipe.watch.patience
        return patience > 0 and self.best is not None and self.step - self.best.step >= patience * every

    def after(self, recipe: Recipe, *, step: int, metrics: Mapping[str, float]) -> "Measured":
        """The same with one more evaluation."""
        name = score_of(recipe)
        start = metrics.get(f"eval/{name}") if step == 0 else self.start(recipe)
        if start is not None:
            metrics = {**metrics, f"{AT_START}{name}": start}
        caught_up = self.later_best is not None and step >= self.later_best.step
        best = better(self.best, recipe, step=step, metrics=metrics, or_equal=caught_up)
        later = self.later_best if best is self.best else None
        return Measured(step=step, metrics=metrics, best=best, later_best=later)

    def beside(self, kept: Best | None, recipe: Recipe, *, step: int) -> "Measured":
        """The same after `step` steps, compared from now on with the best model that the run's folder holds (`kept`).

        Without such a folder, only the last evaluation counts. If the folder holds a model that a process found after
        the checkpoint, the checkpoint's best model is lost. The same computation will find the later one again; from
        that step on, a model as good as the lost one may replace it.
        """
        if kept is None:
            return replace(self, best=better(None, recipe, step=step, metrics=self.of(step)))
        written_again = self.best is not None and self.best.step == step
        return self if kept == self.best or written_again else replace(self, later_best=kept)


def score_of(recipe: Recipe) -> str:
    """Name of the score by which a run's models are compared."""
    return recipe.task.objective.score.name


def better(
    best: Best | None, recipe: Recipe, *, step: int, metrics: Mapping[str, float], or_equal: bool = False
) -> Best | None:
    """The best model after one more evaluation, of a higher score or perhaps an equal one; never that of step 0."""
    name = score_of(recipe)
    score = metrics.get(f"eval/{name}", math.nan)
    if step == 0 or not math.isfinite(score):
        return best
    if best is not None and (score < best.score or (score == best.score and not or_equal)):
        return best
    return Best(name=name, score=score, step=step)


def told_by(folder: Path) -> Provenance:
    """What a whole bundle of a run says about its origin.

    Raises:
        BundleError: It is damaged.
    """
    try:
        return ModelBundle.load(folder).provenance
    except VitregError as error:
        raise BundleError(f"{str(error).rstrip('.')}: delete {folder} and start the run again.") from error


def read_best(run: Path, recipe: Recipe) -> Best | None:
    """Read what the best model of a run says about itself; None if there is none.

    Raises:
        BundleError: Its folder is damaged.
    """
    folder = run / BEST
    if not folder.exists():
        return None
    name = score_of(recipe)
    told = told_by(folder)
    if name not in told.metrics or not told.run or told.run.step is None:
        raise BundleError(f"{folder} does not say its {name} and its step: delete it and start the run again.")
    return Best(name=name, score=told.metrics[name], step=told.run.step)


def measure(trainer: Trainer) -> dict[str, float]:
    """Evaluate the twin, in all processes together, and score what the task compares it with.

    The latter's scores are called ``raw/accuracy`` instead of ``eval/accuracy``, by the name that the task gives it.
    """
    task, found = trainer.parts.task, _evaluated(trainer, trainer.recipe.watch, knn=True)
    for name, network in task.compared.items() if trainer.parts.held_out else ():
        trainer.copy_into_twin(network)
        scores = _evaluated(trainer, replace(trainer.recipe.watch, artifact_images=0), knn=False)
        found |= {key.replace("eval/", f"{name}/"): x for key, x in scores.items() if key.startswith("eval/")}
    trainer.refresh_twin()
    return found


def _evaluated(trainer: Trainer, watch: WatchSettings, *, knn: bool) -> dict[str, float]:
    parts, recipe, accelerator = trainer.parts, trainer.recipe, trainer.accelerator
    parts.twin.to(accelerator.device)
    try:
        return evaluate(
            vit_of(parts.twin),
            parts.task.scorer(parts.twin) if parts.held_out else None,
            held_out=parts.eval_images,
            train=parts.knn_images if knn else None,
            transform=parts.transform,
            device=accelerator.device,
            settings=watch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
        )
    finally:
        parts.twin.to("cpu")


def unmeasured(trainer: Trainer, metrics: Mapping[str, float]) -> str | None:
    """What evaluations of this run cannot find out, and why, in a sentence; None if they find all."""
    parts, watch, score = trainer.parts, trainer.recipe.watch, score_of(trainer.recipe)
    names = [name for name in dict.fromkeys((score, "knn_accuracy")) if f"eval/{name}" not in metrics]
    if not names:
        return None
    if score in names:
        names.append("best model")
    if parts.held_out is None:
        why = f"no images are held out of {parts.data.name} (data.test, data.held_out)"
    elif not watch.eval_images:
        why = "watch.eval_images is 0"
    elif not parts.held_out.has_labels:
        why = f"{parts.held_out.name} has no labels (class folders, or data.label_column)"
    elif not parts.data.has_labels and names[0] == "knn_accuracy":
        why = f"{parts.data.name} has no labels"
    else:
        why = f"no image of {parts.held_out.name} that can be read has what they need"
    return f"there will be no {' and no '.join(names)}: {why}."
