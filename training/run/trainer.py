"""A run in one process: its parts on their device, one step after the other, measured and saved."""

import logging
import math
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.environment import now
from vitreg_hub.errors import TrainingError
from vitreg_hub.files import CURVES_FIGURE, EXTRA_FILES, METRICS_FILE, RECIPE_FILE, replace_folder, write_folder
from vitreg_hub.model_cards.card import render
from vitreg_hub.training.distributed.collectives import all_reduce_sum
from vitreg_hub.training.distributed.parallel import (
    copy_whole,
    full_optimizer_tensors,
    gradients_synced,
    group_counts,
    kept,
    load_group_counts,
    load_optimizer_state,
    wrap,
)
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.optim.optimizer import Rates, build_optimizer, clip_gradients
from vitreg_hub.training.recipes.files import write_recipe
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run import checkpoints as run_state
from vitreg_hub.training.run.assembly import Parts, assemble, vit_of
from vitreg_hub.training.run.best import Best, better
from vitreg_hub.training.run.model_folder import make_bundle, surroundings
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.watch.curves import draw_curves
from vitreg_hub.training.watch.evaluate import EVALUATED_IMAGES, evaluate
from vitreg_hub.training.watch.first_batch import draw_first_batch
from vitreg_hub.training.watch.throughput import Throughput

logger = logging.getLogger(__name__)


class Trainer:
    """The parts of a run on their device, and the steps that are done. All processes call everything in the same order.

    Attributes:
        step: Steps that are done.
        metrics: The last evaluation.
        evaluated: Steps that were done when it was made.
        best: The best model so far, if any evaluation told a score.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        """Build all parts and put them on the device.

        Raises:
            VitregError: As `assemble`.
        """
        self._started, self._seconds_before = time.monotonic(), 0.0
        self.recipe, self.accelerator = recipe, accelerator
        self.parts: Parts = assemble(recipe, rank=accelerator.process_index, world_size=accelerator.num_processes)
        task, fsdp2 = self.parts.task, recipe.scale.sharding == "fsdp2"
        self.network = wrap(task.network, accelerator, fsdp2=fsdp2)
        for module in task.frozen.values():
            wrap(module, accelerator, fsdp2=fsdp2, trained=False)
        optimizer = build_optimizer(task.network, recipe.optim, depth=len(vit_of(self.parts.twin).blocks))
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.rates = Rates.of(recipe.optim, self.parts.span, batch_size=recipe.batch_size, hold=task.hold)
        self.names = {parameter: name for name, parameter in task.network.named_parameters()}
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.evaluated = -1
        self.best: Best | None = None
        self._later_best: Best | None = None
        self._copied = -1
        self._surroundings = surroundings(recipe, accelerator)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far; what a killed process did after its last checkpoint is lost."""
        return round(self._seconds_before + time.monotonic() - self._started, 1)

    @property
    def _length(self) -> dict[str, int | None]:
        """What the schedules and the order of the images follow from."""
        return {"images": self.parts.data.num_images, "steps": self.parts.span.total_steps}

    def steps(self, throughput: Throughput) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each step that is left with the batches of its parts."""
        first, total = self.step, self.parts.span.total_steps
        batches = iter(self.parts.loader.batches(first, total))
        for step in range(first, total):
            with throughput.waiting():
                parts = list(islice(batches, self.recipe.scale.accumulate))
            for name in (name for part in parts for name in part.corrupt):
                logger.warning("cannot be read and was replaced: %s", name)
            yield step, parts

    def do_step(
        self, step: int, batches: list[Batch], throughput: Throughput, stop: threading.Event, out: Path | None
    ) -> tuple[dict[str, float], bool]:
        """Forward, backward, update.

        Args:
            step: Number of the step.
            batches: Its parts of this process.
            throughput: Counts operations.
            stop: Whether this process was asked to stop.
            out: The run's folder, for messages, if there is one.

        Returns:
            The global batch's metrics, and whether any process was asked to stop.

        Raises:
            TrainingError: The loss is no number.
        """
        recipe, task, accelerator = self.recipe, self.parts.task, self.accelerator
        self.rates.apply(self.optimizer, step)
        terms: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            # what the network draws depends on nothing that came before
            torch.manual_seed(seed_of(recipe.seed, step, part, accelerator.process_index))
            last = part == len(batches) - 1
            with throughput.counting(), gradients_synced(self.network, accelerator, wanted=last):
                with accelerator.autocast():  # of teachers too, which are not wrapped
                    output = task.training_step(self.network, on_device(batch, accelerator.device))
                accelerator.backward(output.loss / len(batches))
            terms.append({"loss": output.loss.detach(), **output.metrics})
        accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(task.network, recipe.optim)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            task.after_step(step)
        # the device is waited for once, when everything has been handed to it
        means = {name: torch.stack([term[name].float() for term in terms]).mean() for name in terms[0]}
        counts = {"unreadable_images": self.parts.loader.num_corrupt, "stops": stop.is_set()}
        mine = torch.stack([*means.values(), *(means["loss"].new_tensor(float(count)) for count in counts.values())])
        sums = dict(zip([*means, *counts], all_reduce_sum(mine).tolist(), strict=True))
        metrics = {name: sums[name] / accelerator.num_processes for name in means}
        if not math.isfinite(metrics["loss"]):
            self._refuse(step, batches, metrics["loss"], finite=bool(means["loss"].isfinite()), out=out)
        self.step = step + 1
        metrics |= {"lr": self.rates.lr(step), "weight_decay": self.rates.weight_decay(step)}
        if norm is not None:
            metrics["grad_norm"] = norm.item()
        if sums["unreadable_images"]:
            metrics["unreadable_images"] = sums["unreadable_images"]
        return metrics, sums["stops"] > 0

    def _refuse(self, step: int, batches: list[Batch], loss: float, *, finite: bool, out: Path | None) -> None:
        mine = [] if finite else [name for batch in batches for name in batch.names]
        images = gather_object(mine)
        saved = run_state.checkpoints(out) if out else []
        kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet (watch.save_every)"
        raise TrainingError(
            f"the loss is {loss} in step {step}, whose batch begins with {', '.join(images[:4])}: {kept}; lower "
            "optim.lr, set optim.clip, or look at those images."
        )

    def evaluate(self) -> dict[str, float]:
        """Measure what would be published now."""
        parts, device = self.parts, self.accelerator.device
        self.refresh_twin()
        parts.twin.to(device)
        try:
            self.metrics = evaluate(
                vit_of(parts.twin),
                parts.task.scorer(parts.twin) if parts.held_out else None,
                held_out=parts.looked_at,
                train=parts.reference if parts.held_out else None,
                transform=parts.transform,
                device=device,
                settings=self.recipe.watch,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                seed=self.recipe.seed,
                num_workers=self.recipe.data.num_workers,
            )
        finally:
            parts.twin.to("cpu")
        self.evaluated = self.step
        before, later = self.best, self._later_best
        over = later is not None and self.step >= later.step
        self.best = better(before, self.recipe, step=self.step, metrics=self.metrics, or_equal=over)
        if self.best is not before:
            self._later_best = None
        return self.metrics

    def refresh_twin(self) -> None:
        """Copy what would be published now, whole, once in a step; all processes must ask for it."""
        if self._copied != self.step:
            copy_whole(self.parts.task.published, self.parts.twin)
            self._copied = self.step

    def save(self, out: Path, *, published: bool = False) -> Path | None:
        """Write a checkpoint; returns its folder on the main process.

        Args:
            out: The run's folder.
            published: Whether it goes to the Hub, and so tells how the run went.

        Raises:
            BundleError: It cannot be written; earlier ones stay.
        """
        task = self.parts.task
        main = self.accelerator.is_main_process
        weights = run_state.split_weights(task.network, task.frozen, keep=main)
        optimizer = self.optimizer.optimizer
        weights["optimizer"] = kept(full_optimizer_tensors(optimizer, self.names), keep=main)
        loaders = tuple(gather_object([self.parts.loader.state()]))
        scaler = self.accelerator.scaler
        extra = {
            "metrics": self.metrics,
            "evaluated": self.evaluated,
            "best": asdict(self.best) if self.best else None,
            "seconds": self.seconds,
            "scaler": scaler.state_dict() if scaler else {},
            "groups": group_counts(optimizer),
            "length": self._length,
        }
        self.refresh_twin()
        folder = None
        if main:
            state = run_state.RunState(step=self.step, weights=weights, loaders=loaders, extra=extra)
            folder = run_state.save_checkpoint(
                out,
                state,
                write_model=lambda staging: self._fill(staging, self.bundle(), run=out if published else None),
                keep=self.recipe.watch.keep,
            )
        self.accelerator.wait_for_everyone()
        return folder

    def bundle(self, *, best: Best | None = None) -> ModelBundle:
        """The twin as a bundle, with what was measured of these weights; `best` if it is as such that they are kept."""
        measured = self.metrics if self.evaluated == self.step else {}
        scores = {name.removeprefix("eval/"): x for name, x in measured.items() if name.startswith("eval/")}
        made = {**self._surroundings, "created": now(), "seconds": self.seconds}
        evaluated = measured.get(EVALUATED_IMAGES)
        return make_bundle(
            self.recipe, self.parts, step=self.step, metrics=scores, evaluated=evaluated, made=made, best=best
        )

    def write_model(self, folder: Path, *, run: Path, best: Best | None = None) -> None:
        """Write the twin's bundle in the place of an older one, and what belongs beside it; on the main process only.

        Args:
            folder: Of the bundle.
            run: The run's, whose recipe, metrics and curves go with the bundle.
            best: By what it is the best one, in the folder of that.

        Raises:
            BundleError: It cannot be written; the older one stays.
        """
        bundle = self.bundle(best=best)
        self.parts.task.write_beside(self.parts.twin, bundle, folder)
        replace_folder(folder, lambda new: write_folder(new, lambda staging: self._fill(staging, bundle, run=run)))

    def _fill(self, folder: Path, bundle: ModelBundle, *, run: Path | None) -> None:
        """Write a bundle, its card and, of a run, how it went."""
        files = []
        if run is not None:
            title = f"{self.recipe.name}: {bundle.arch} after {self.step:,} steps"
            draw_curves(run / METRICS_FILE, run / CURVES_FIGURE, title=title)
            files = [name for name in EXTRA_FILES if (run / name).is_file()]
            for name in files:
                if name == RECIPE_FILE:  # the run's own tells what others need not know
                    write_recipe(self.recipe, folder, public=True)
                else:
                    shutil.copyfile(run / name, folder / name)
        bundle.write_into(folder, card=render(bundle, files=files))

    def restore(self, state: run_state.RunState, *, called: Path) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            TrainingError: It is of another network or number of processes.
        """
        task = self.parts.task
        if state.extra["length"] != self._length:
            before, now = (
                f"{x['images']} images and {x['steps']} steps" for x in (state.extra["length"], self._length)
            )
            raise TrainingError(f"{called} is of a run with {before}, but this one has {now}: give it the same data.")
        try:
            run_state.load_weights(task.network, task.frozen, state.weights)
            load_optimizer_state(self.optimizer.optimizer, self.names, state.weights.get("optimizer", {}))
            load_group_counts(self.optimizer.optimizer, state.extra["groups"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{called} is of another network ({error}): give its own run's folder.") from error
        self.parts.loader.load_state(state.loaders)
        if self.accelerator.scaler and state.extra["scaler"]:
            self.accelerator.scaler.load_state_dict(state.extra["scaler"])
        extra = state.extra
        self.step, self.metrics, self.evaluated = state.step, dict(extra["metrics"]), extra["evaluated"]
        self.best = Best(**extra["best"]) if extra.get("best") else None
        self._seconds_before = extra.get("seconds", 0.0)
        self._copied = -1

    def reconcile_best(self, kept: Best | None) -> None:
        """Compare from now on with what this run really has.

        Without a folder of the best model, what came before the last evaluation counts no more. If that folder holds
        what a process found after the checkpoint, the checkpoint's best one is lost: a process that computes the same
        finds the same again, and after that step any other one takes what is as good as the lost one.

        Args:
            kept: What the folder of the best model holds.
        """
        if kept is None:
            measured = self.evaluated == self.step
            self.best = better(None, self.recipe, step=self.step, metrics=self.metrics) if measured else None
        elif kept != self.best and not (self.best and self.best.step == self.step):  # which would be written again
            self._later_best = kept

    def draw(self, batch: Batch, file: Path) -> None:
        """Draw a batch as the network sees it."""
        parts = self.parts
        draw_first_batch(batch, mean=parts.mean, std=parts.std, file=file, label_names=parts.data.label_names)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its images and labels where the network is."""
    return replace(
        batch,
        crops=tuple(crop.to(device, non_blocking=True) for crop in batch.crops),
        labels=None if batch.labels is None else batch.labels.to(device, non_blocking=True),
    )
