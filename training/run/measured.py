"""What the evaluations of a run have found, which model was best, and how to make an evaluation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, VitregError
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.assembly import vit_of
from vitreg_hub.training.run.folders import BEST
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.watch.evaluate import evaluate


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best model of a run so far; of equal ones the first.

    Attributes:
        name: Name of the score.
        score: Its value.
        step: Steps done.
    """

    name: str
    score: float
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the evaluations of a run have found so far.

    Attributes:
        step: Steps done at the last one; -1 before the first.
        metrics: What that one found.
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

    def after(self, recipe: Recipe, *, step: int, metrics: Mapping[str, float]) -> "Measured":
        """The same with one more evaluation."""
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


def better(
    best: Best | None, recipe: Recipe, *, step: int, metrics: Mapping[str, float], or_equal: bool = False
) -> Best | None:
    """The best model after one more evaluation, of a higher score or perhaps an equal one; never that of step 0."""
    name = recipe.task.objective.score.name
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
    name = recipe.task.objective.score.name
    told = told_by(folder)
    if name not in told.metrics or not told.run or told.run.step is None:
        raise BundleError(f"{folder} does not say its {name} and its step: delete it and start the run again.")
    return Best(name=name, score=told.metrics[name], step=told.run.step)


def measure(trainer: Trainer) -> dict[str, float]:
    """Evaluate the twin, in all processes together."""
    parts, recipe, accelerator = trainer.parts, trainer.recipe, trainer.accelerator
    parts.twin.to(accelerator.device)
    try:
        return evaluate(
            vit_of(parts.twin),
            parts.task.scorer(parts.twin) if parts.held_out else None,
            held_out=parts.eval_images,
            train=parts.knn_images,
            transform=parts.transform,
            device=accelerator.device,
            settings=recipe.watch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
        )
    finally:
        parts.twin.to("cpu")
