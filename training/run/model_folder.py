"""The folder of a run's model: its bundle, and what goes with it."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel, Provenance, TrainingRun
from vitreg_hub.environment import command, commit, hardware, public_text, versions
from vitreg_hub.training.recipes.files import public_settings
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.assembly import Parts, vit_of
from vitreg_hub.training.run.best import Best
from vitreg_hub.training.run.origins import START, TEACHER, license_of
from vitreg_hub.training.tasks.contrastive.settings import Contrastive


def surroundings(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """By what a run is made, as fields of `Provenance`."""
    libraries = ("accelerate", "datasets", *["open_clip_torch"] * isinstance(recipe.task, Contrastive))
    return {
        "versions": versions(*libraries),
        "command": command(),
        "commit": commit(),
        "hardware": hardware(accelerator.device, num_processes=accelerator.num_processes),
    }


def make_bundle(
    recipe: Recipe,
    parts: Parts,
    *,
    step: int,
    metrics: Mapping[str, float],
    evaluated: int | None = None,
    made: Mapping[str, Any],
    best: Best | None = None,
) -> ModelBundle:
    """Bundle the twin, with how it came about, as others may know it.

    Args:
        recipe: The run.
        parts: Its twin holds the weights of `step`.
        step: Steps that are done.
        metrics: What was measured of these weights.
        evaluated: On how many images, if it was.
        made: By what, when and how long, as fields of `Provenance`.
        best: By what these weights are the run's best ones, if it is as such that they are bundled.
    """
    data = public_text(parts.data.name)
    words = {source.setting: source.words for source in parts.sources}
    how = f"trained on from {words[START]}" if START in words else "trained from scratch"
    if TEACHER in words:
        how += f", distilled from {words[TEACHER]},"
    run = TrainingRun(
        recipe=public_settings(recipe),
        step=step,
        total_steps=parts.span.total_steps,
        evaluated=evaluated,
        sources={source.setting: source.record() for source in parts.sources},
    )
    provenance = Provenance(
        origin=f"{how} on {data} with vitreg_hub's recipe {recipe.name}, {step} steps",
        license=license_of(recipe, parts.sources, published=False),
        dataset=data,
        metrics=metrics,
        made=run,
        best=best and BestModel(score=best.name, step=best.step),
        **made,
    )
    vit = vit_of(parts.twin)
    labels = parts.data.label_names if vit.num_classes else None
    return ModelBundle.from_timm(vit, arch=recipe.model.arch, provenance=provenance, label_names=labels)
