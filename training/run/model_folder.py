"""The folder of a run's model: the bundle and the files beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel, Provenance, TrainingRun
from vitreg_hub.environment import made_with, now, public_text
from vitreg_hub.files import CURVES_FIGURE, EXTRA_FILES, METRICS_FILE, RECIPE_FILE, replaced_folder
from vitreg_hub.model_cards.card import render
from vitreg_hub.training.recipes.files import public_settings, write_recipe
from vitreg_hub.training.run.assembly import vit_of
from vitreg_hub.training.run.measured import Measured
from vitreg_hub.training.run.origins import START, license_of
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.watch.curves import draw_curves
from vitreg_hub.training.watch.evaluate import EVALUATED_IMAGES


class ModelWriter:
    """Writes the twin of a run as bundles, with the files beside them; on the main process only.

    Args:
        trainer: Its twin holds the weights of its step.
    """

    def __init__(self, trainer: Trainer, *, draw_curves: Callable[..., object] = draw_curves) -> None:
        self.trainer, self._draw_curves = trainer, draw_curves
        libraries = ("accelerate", "datasets", *trainer.recipe.task.libraries)
        accelerator = trainer.accelerator
        self._made_with = made_with(*libraries, device=accelerator.device, num_processes=accelerator.num_processes)

    def bundle(self, measured: Measured, *, as_best: bool = False) -> ModelBundle:
        """The twin as a bundle that may be published, with the metrics of these weights if they were evaluated."""
        trainer, recipe, parts = self.trainer, self.trainer.recipe, self.trainer.parts
        found, best = measured.of(trainer.step), measured.best if as_best else None
        data = public_text(parts.data.name)
        words = {source.setting: source.words for source in parts.sources}
        how = f"trained on from {words[START]}" if START in words else "trained from scratch"
        for setting in recipe.task.teachers():
            how += f", distilled from {words[setting]},"
        provenance = Provenance(
            origin=f"{how} on {data} with vitreg_hub's recipe {recipe.name}, {trainer.step} steps",
            license=license_of(recipe, parts.sources, published=False),
            dataset=data,
            metrics={name.removeprefix("eval/"): x for name, x in found.items() if name.startswith("eval/")},
            made=TrainingRun(
                recipe=public_settings(recipe),
                objective=recipe.task.objective,
                step=trainer.step,
                total_steps=trainer.step if trainer.ended_early else parts.span.total_steps,
                start_score=measured.start(recipe),
                evaluated=int(found[EVALUATED_IMAGES]) if EVALUATED_IMAGES in found else None,
                sources={source.setting: source.record() for source in parts.sources},
            ),
            best=best and BestModel(score=best.name, step=best.step),
            created=now(),
            seconds=trainer.seconds,
            **self._made_with,
        )
        vit = vit_of(parts.twin)
        labels = parts.data.label_names if vit.num_classes else None
        return ModelBundle.from_timm(vit, arch=parts.arch, provenance=provenance, label_names=labels)

    def write(self, folder: Path, measured: Measured, *, run: Path, as_best: bool = False) -> None:
        """Write the bundle and the files beside it, replacing an older one.

        Args:
            run: The run's folder, whose recipe, metrics and curves are added to the bundle.
            as_best: Whether the bundle says that it is the run's best model.

        Raises:
            BundleError: It cannot be written; the older one stays.
        """
        bundle = self.bundle(measured, as_best=as_best)
        self.trainer.parts.task.write_beside(self.trainer.parts.twin, bundle, folder)
        with replaced_folder(folder) as staging:
            self.fill(staging, bundle, run=run)

    def fill(self, folder: Path, bundle: ModelBundle, *, run: Path | None) -> None:
        """Write a bundle, its card and, given a run's folder, how the run went."""
        recipe, files = self.trainer.recipe, []
        if run is not None:
            title = f"{recipe.name}: {bundle.arch} after {self.trainer.step:,} steps"
            self._draw_curves(run / METRICS_FILE, run / CURVES_FIGURE, title=title)
            files = [name for name in EXTRA_FILES if (run / name).is_file()]
            for name in files:
                if name == RECIPE_FILE:  # the run's own file may contain private paths
                    write_recipe(recipe, folder, public=True)
                else:
                    shutil.copyfile(run / name, folder / name)
        bundle.write_into(folder, card=render(bundle, files=files))
