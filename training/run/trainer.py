"""A run in one process: its parts on their device, and its steps: forward, backward, update, metrics."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn

from vitreg_hub.errors import TrainingError
from vitreg_hub.training.distributed.collectives import all_reduce_sum
from vitreg_hub.training.distributed.parallel import copy_whole, gradients_synced, wrap
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.optim.optimizer import Rates, build_optimizer, clip_gradients
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.assembly import Parts, assemble, vit_of
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.watch.throughput import Throughput

logger = logging.getLogger(__name__)


class Trainer:
    """The parts of a run on their device, and its steps. All processes must make the same calls in the same order.

    Attributes:
        ended_early: Whether the run is to have no more steps, although some are left.
        names: Names of the network's parameters.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Build all parts and put them on the device.

        Raises:
            VitregError: As `assemble`.
        """
        self.recipe, self.accelerator, self._clock, self._began = recipe, accelerator, clock, clock()
        self.parts: Parts = assemble(recipe, rank=accelerator.process_index, world_size=accelerator.num_processes)
        task, fsdp2 = self.parts.task, recipe.scale.sharding == "fsdp2"
        self.network = wrap(task.network, accelerator, fsdp2=fsdp2)
        for module in task.frozen.values():
            wrap(module, accelerator, fsdp2=fsdp2, trained=False)
        optimizer = build_optimizer(task.network, recipe.optim, depth=len(vit_of(self.parts.twin).blocks))
        self.optimizer = cast(AcceleratedOptimizer, accelerator.prepare_optimizer(optimizer))
        self.rates = Rates.of(recipe.optim, self.parts.span, batch_size=recipe.batch_size, hold=task.hold)
        self.names = {parameter: name for name, parameter in task.network.named_parameters()}
        device, precision = accelerator.device, accelerator.mixed_precision
        self.throughput = Throughput(batch_size=recipe.batch_size, device=device, precision=precision)
        self.step = 0
        self.ended_early = False
        self._copied = -1

    @property
    def done(self) -> bool:
        """Whether no step is left, or the run has ended early."""
        return self.ended_early or self.step == self.parts.span.total_steps

    @property
    def length(self) -> dict[str, int | None]:
        """What determines the schedules and the order of the images."""
        return {"images": self.parts.data.num_images, "steps": self.parts.span.total_steps}

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, without what a killed process did after its last checkpoint."""
        return round(self._clock() - self._began, 1)

    def go_on_from(self, step: int, *, seconds: float) -> None:
        """Continue after so many steps, which took so long and whose state has been loaded."""
        self.step, self._copied = step, -1
        self._began -= seconds

    def steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each remaining step with the batches of its parts."""
        first, total = self.step, self.parts.span.total_steps
        batches = iter(self.parts.loader.batches(first, total))
        for step in range(first, total):
            with self.throughput.waiting():
                parts = list(islice(batches, self.recipe.scale.accumulate))
            for part in parts:
                for name in part.corrupt:
                    logger.warning("cannot be read and was replaced: %s", name)
            yield step, parts

    def do_step(
        self, step: int, batches: list[Batch], stop: threading.Event, out: Path | None
    ) -> tuple[dict[str, float], bool]:
        """Forward, backward, update.

        Args:
            stop: Whether this process was asked to stop.
            out: The run's folder, for messages.

        Returns:
            The global batch's metrics, and whether any process was asked to stop.

        Raises:
            TrainingError: The loss is not finite.
        """
        recipe, task, accelerator = self.recipe, self.parts.task, self.accelerator
        self.rates.apply(self.optimizer, step)
        terms: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            # what the network draws must not depend on anything before
            torch.manual_seed(seed_of(recipe.seed, step, part, accelerator.process_index))
            last = part == len(batches) - 1
            with self.throughput.counting(), gradients_synced(self.network, accelerator, wanted=last):
                with accelerator.autocast():  # for teachers, which are not wrapped
                    output = task.training_step(self.network, on_device(batch, accelerator.device))
                accelerator.backward(output.loss / len(batches))
            terms.append({"loss": output.loss.detach(), **output.metrics})
        accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(task.network, recipe.optim)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            task.after_step(step)
        # this waits for the device, once and only after all work was queued
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
        self.throughput.step_done()
        return metrics, sums["stops"] > 0

    def _refuse(self, step: int, batches: list[Batch], loss: float, *, finite: bool, out: Path | None) -> None:
        images = gather_object([] if finite else [name for batch in batches for name in batch.names])
        saved = checkpoints(out) if out else []
        kept = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet (watch.save_every)"
        raise TrainingError(
            f"the loss is {loss} in step {step + 1}, whose batch begins with {', '.join(images[:4])}: {kept}; lower "
            "optim.lr, set optim.clip, or look at those images."
        )

    def refresh_twin(self) -> None:
        """Copy the model as it would be published now, once per step; all processes must call it."""
        if self._copied != self.step:
            self.copy_into_twin(self.parts.task.published)
            self._copied = self.step

    def copy_into_twin(self, network: nn.Module) -> None:
        """Let the twin have another network's weights until it is refreshed; all processes must call it."""
        copy_whole(network, self.parts.twin)
        self._copied = -1


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its images and labels on a device."""
    return replace(
        batch,
        crops=tuple(crop.to(device, non_blocking=True) for crop in batch.crops),
        labels=None if batch.labels is None else batch.labels.to(device, non_blocking=True),
    )
