"""The best model of a run: which one it is, and what its folder says about it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vitreg_hub.bundle.config import read_config
from vitreg_hub.bundle.provenance import provenance_from_json
from vitreg_hub.errors import BundleError
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.folders import BEST


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


def better(
    best: Best | None, recipe: Recipe, *, step: int, metrics: Mapping[str, float], or_equal: bool = False
) -> Best | None:
    """The best model after one more evaluation. The untrained model of step 0 never counts.

    Args:
        best: The best one before.
        recipe: The run.
        step: Steps done.
        metrics: What the evaluation found, scores as ``eval/name``.
        or_equal: Whether an equal score replaces the best one.
    """
    name = recipe.task.objective.score.name
    score = metrics.get(f"eval/{name}", math.nan)
    if step == 0 or not math.isfinite(score):
        return best
    if best is not None and (score < best.score or (score == best.score and not or_equal)):
        return best
    return Best(name=name, score=score, step=step)


def read_best(run: Path, recipe: Recipe) -> Best | None:
    """Read what the best model of a run says about itself, without its weights; None if there is none.

    Raises:
        BundleError: Its folder is damaged.
    """
    folder = run / BEST
    if not folder.is_dir():
        return None
    name = recipe.task.objective.score.name
    told = provenance_from_json(read_config(folder, called=str(folder))["vitreg"].get("provenance"))
    if name not in told.metrics or not told.run or told.run.step is None:
        raise BundleError(f"{folder} does not say its {name} and its step: delete it and start the run again.")
    return Best(name=name, score=told.metrics[name], step=told.run.step)
