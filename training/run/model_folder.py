"""The folder of a run's model: the bundle and the files beside it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel, Provenance, TrainingRun
from vitreg_hub.environment import command, commit, hardware, now, public_text, versions
from vitreg_hub.files import CURVES_FIGURE, EXTRA_FILES, METRICS_FILE, RECIPE_FILE, replaced_folder
from vitreg_hub.model_cards.card import render
from vitreg_hub.training.recipes.files import public_settings, write_recipe
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.assembly import Parts, vit_of
from vitreg_hub.training.run.best import Best
from vitreg_hub.training.run.measured import Measured
from vitreg_hub.training.run.origins import START, license_of
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.watch.curves import draw_curves
from vitreg_hub.training.watch.evaluate import EVALUATED_IMAGES


class ModelWriter:
    """Writes the twin of a run as bundles, with the files beside them; on the main process only.

    Args:
        trainer: Its twin holds the weights of its step.
        seconds: Returns the wall time of the run so far.
        draw_curves: Draws how the run went.
    """

    def __init__(
        self, trainer: Trainer, seconds: Callable[[], float], *, draw_curves: Callable[..., object] = draw_curves
    ) -> None:
        self._trainer, self.seconds, self._draw_curves = trainer, seconds, draw_curves
        self._surroundings = surroundings(trainer.recipe, trainer.accelerator)

    def bundle(self, measured: Measured, *, as_best: bool = False) -> ModelBundle:
        """The twin as a bundle, with the metrics of these weights, if they were evaluated."""
        trainer, found = self._trainer, measured.of(self._trainer.step)
        return make_bundle(
            trainer.recipe,
            trainer.parts,
            step=trainer.step,
            metrics={name.removeprefix("eval/"): x for name, x in found.items() if name.startswith("eval/")},
            evaluated=int(found[EVALUATED_IMAGES]) if EVALUATED_IMAGES in found else None,
            made={**self._surroundings, "created": now(), "seconds": self.seconds()},
            best=measured.best if as_best else None,
        )

    def write(self, folder: Path, measured: Measured, *, run: Path, as_best: bool = False) -> None:
        """Write the bundle and the files beside it, replacing an older one.

        Args:
            folder: Of the bundle.
            measured: What was measured so far.
            run: The run's folder, whose recipe, metrics and curves are added to the bundle.
            as_best: Whether the bundle says that this is the run's best model.

        Raises:
            BundleError: It cannot be written; the older one stays.
        """
        bundle = self.bundle(measured, as_best=as_best)
        self._trainer.parts.task.write_beside(self._trainer.parts.twin, bundle, folder)
        with replaced_folder(folder) as staging:
            self.fill(staging, bundle, run=run)

    def fill(self, folder: Path, bundle: ModelBundle, *, run: Path | None) -> None:
        """Write a bundle, its card and, given a run's folder, how the run went."""
        recipe, files = self._trainer.recipe, []
        if run is not None:
            title = f"{recipe.name}: {bundle.arch} after {self._trainer.step:,} steps"
            self._draw_curves(run / METRICS_FILE, run / CURVES_FIGURE, title=title)
            files = [name for name in EXTRA_FILES if (run / name).is_file()]
            for name in files:
                if name == RECIPE_FILE:  # the run's own file may contain private paths
                    write_recipe(recipe, folder, public=True)
                else:
                    shutil.copyfile(run / name, folder / name)
        bundle.write_into(folder, card=render(bundle, files=files))


def surroundings(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    """Software, command and hardware of a run, as fields of `Provenance`."""
    return {
        "versions": versions("accelerate", "datasets", *recipe.task.libraries),
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
    """Bundle the twin, with its provenance in a form that may be published.

    Args:
        recipe: The run.
        parts: Its twin holds the weights of `step`.
        step: Steps done.
        metrics: What was measured of these weights.
        evaluated: Number of images they were evaluated on, if they were.
        made: With what, when and how long, as fields of `Provenance`.
        best: The score by which these weights are the run's best ones, if they are bundled as such.
    """
    data = public_text(parts.data.name)
    words = {source.setting: source.words for source in parts.sources}
    how = f"trained on from {words[START]}" if START in words else "trained from scratch"
    for setting in recipe.task.teachers():
        how += f", distilled from {words[setting]},"
    run = TrainingRun(
        recipe=public_settings(recipe),
        objective=recipe.task.objective,
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
