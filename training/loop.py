"""The training loop of all tasks: its steps, and the logging, evaluating, saving and publishing between them."""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from accelerate.utils import gather_object

from vitreg_hub.errors import BundleError, RecipeError, TrainingError
from vitreg_hub.licenses import settle
from vitreg_hub.training.recipes.files import write_recipe
from vitreg_hub.training.recipes.settings import Recipe, require_start, to_dict
from vitreg_hub.training.run.assembly import make_accelerator
from vitreg_hub.training.run.checkpoints import find_checkpoint, restore_run, save_run
from vitreg_hub.training.run.folders import BEST, FIRST_BATCH, MODEL
from vitreg_hub.training.run.lock import locked
from vitreg_hub.training.run.measured import AT_START, Best, Measured, measure, read_best, score_of, told_by, unmeasured
from vitreg_hub.training.run.model_folder import ModelWriter
from vitreg_hub.training.run.origins import license_of
from vitreg_hub.training.run.publisher import Publisher
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.watch.curves import draw_curves
from vitreg_hub.training.watch.first_batch import draw_first_batch
from vitreg_hub.training.watch.logbook import Logbook, require_trackers

logger = logging.getLogger(__name__)

DRY_STEPS = (3, 8)
"""Steps of a dry run that are not timed, and those that are."""
DRY_SECONDS = 20
STOPPING = b"\nstopping: a checkpoint is written after this step; Ctrl-C again stops at once\n"
GO_ON = "the same command goes on"
ECHO = 1.0
"""Seconds in which a second Ctrl-C counts as the same one: launchers of several processes pass it on to them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How far a run got.

    Attributes:
        folder: The run's folder.
        model: Folder of the bundle; None if the run is not finished.
        best: The model in the folder `best`, if there was an evaluation.
        commits: Address of the last commit on each branch that was published: the bundles of `model` and `best` if the
            run is finished, else those of the last checkpoint.
    """

    folder: Path
    step: int
    total_steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    model: Path | None = None
    best: Best | None = None
    commits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruments:
    """What a run uses besides its own parts, so that tests can replace it."""

    publisher: Callable[..., Publisher] = Publisher
    measure: Callable[[Trainer], Mapping[str, float]] = measure
    clock: Callable[[], float] = time.monotonic
    draw_curves: Callable[..., object] = draw_curves
    draw_first_batch: Callable[..., object] = draw_first_batch


INSTRUMENTS = Instruments()


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: str = "auto",
    push: str | None = None,
    push_every: Literal["end", "save"] = "end",
    private: bool = False,
    instruments: Instruments = INSTRUMENTS,
) -> TrainResult:
    """Train what a recipe says, or go on where an earlier process stopped.

    Everything random follows from the seed, the step and the place in the global batch, so a run that was killed and
    resumed ends with the same weights as one that was not. On SIGTERM a checkpoint is written and the function returns.
    On Ctrl-C too, but it then raises KeyboardInterrupt; a second one stops at once. A finished run goes on if its
    recipe gets more `epochs`, or one that ended early more `watch.patience`.

    Args:
        out: Its folder: `recipe.yaml`, `metrics.jsonl`, `first_batch.png`, `checkpoints`, from the first evaluation on
            `best`, and at the end `curves.png` and `model`.
        resume: "auto" goes on from the newest checkpoint in `out`, if there is one; "never" requires a new folder;
            anything else is a checkpoint's folder.
        push: ``org/name`` to publish bundles under, in the background: the last one on the branch main, the best one on
            the branch best.
        push_every: Whether to publish at every checkpoint ("save") or only at the end.
        private: Whether only its owner can see a new repository.

    Raises:
        RecipeError: Settings contradict each other, the data, the processes, or the run in `out`; or another run uses
            `out`.
        LicenseError: The recipe's license contradicts that of its start or its teacher, or it is to be published
            without a license.
        DataError: The images cannot be used.
        TrainingError: The loss is not finite; the last checkpoint stays.
        BundleError: `out` cannot be written to; whatever is complete in it stays.
        HubError: The Hub refuses at the start to take the run's models; or the last model could not be published, and
            `out` is complete.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    out = Path(out)
    require_start(recipe)
    require_trackers(recipe.watch.trackers)
    accelerator = make_accelerator(recipe)
    find_checkpoint(out, recipe, resume)  # refuses what is no run, before anything is written into it
    with locked(out, main=accelerator.is_main_process), torch.random.fork_rng(), ExitStack() as closing:
        checkpoint = find_checkpoint(out, recipe, resume)
        found = gather_object([checkpoint.name if checkpoint else None])  # before one of them writes anything
        if len(set(found)) > 1:
            raise BundleError(
                f"not all processes see the same checkpoints in {out}: give a folder that all machines share."
            )
        publisher = None
        if push and accelerator.is_main_process:
            # fails if there is no token
            publisher = instruments.publisher(push, private=private, license=recipe.license)
            publisher.ask(towers=recipe.task.objective.text_tower)
        if (out / MODEL).exists() and (result := _finished(recipe, out, publisher)):
            return result
        if (out / MODEL).exists() and checkpoint is None:
            raise TrainingError(f"{out} has no checkpoint from which it could go on: take another folder.")
        if publisher:
            closing.enter_context(publisher)
        trainer = Trainer(recipe, accelerator, clock=instruments.clock)
        license_of(recipe, trainer.parts.sources, published=push is not None)
        measured = restore_run(trainer, checkpoint) if checkpoint else Measured()
        if checkpoint and accelerator.is_main_process:
            logger.info(
                "going on after step %d of %d, from %s", trainer.step, trainer.parts.span.total_steps, checkpoint
            )
        if accelerator.is_main_process:
            write_recipe(recipe, out)
            measured = measured.beside(read_best(out, recipe), recipe, step=trainer.step)
        writer = ModelWriter(trainer, draw_curves=instruments.draw_curves)
        uploads = publisher if push_every == "save" else None
        with _stop_signals(patience=ECHO * (accelerator.num_processes > 1)) as stop:
            measured = _go_on(writer, measured, out, stop=stop, publisher=uploads, instruments=instruments)
            if signal.SIGINT in gather_object([stop.by]) and not trainer.done:
                logger.warning("stopped after step %d of %d: %s", trainer.step, trainer.parts.span.total_steps, GO_ON)
                raise KeyboardInterrupt
        if trainer.done:
            trainer.refresh_twin()  # needed if the run was killed after its last step
            if accelerator.is_main_process:
                writer.write(out / MODEL, measured, run=out)
        accelerator.wait_for_everyone()  # only the main process waits for uploads
        return TrainResult(
            folder=out,
            step=trainer.step,
            total_steps=trainer.parts.span.total_steps,
            metrics=dict(measured.metrics),
            model=out / MODEL if trainer.done else None,
            best=read_best(out, recipe),
            commits=_commits(publisher, out, done=trainer.done),
        )


def _go_on(
    writer: ModelWriter,
    measured: Measured,
    out: Path,
    *,
    stop: "StopEvent",
    publisher: Publisher | None,
    instruments: Instruments,
) -> Measured:
    """Train up to the last step, or until `stop` is set in one of the processes; returns what was measured."""
    trainer, recipe, watch = writer.trainer, writer.trainer.recipe, writer.trainer.recipe.watch
    main = trainer.accelerator.is_main_process
    logbook = Logbook(
        folder=out,
        accelerator=trainer.accelerator,
        total_steps=trainer.parts.span.total_steps,
        start_step=trainer.step,
        throughput=trainer.throughput,
        name=recipe.name,
        trackers=watch.trackers,
        config=to_dict(recipe),
    )

    def evaluate() -> Measured:
        trainer.refresh_twin()
        return measured.after(recipe, step=trainer.step, metrics=instruments.measure(trainer))

    def note() -> None:
        """Log the last evaluation, and write its model if it is the best so far."""
        below = measured.start(recipe) if measured.is_best and measured.is_below_start(recipe) else None
        logbook.note(trainer.step, measured.metrics, best=measured.is_best, below=below)
        if measured.is_best and main:
            writer.write(out / BEST, measured, run=out, as_best=True)
        # the best model is known to the main process
        if any(gather_object([main and measured.is_stalled(recipe, every=steps_of(watch.eval_every))])):
            trainer.ended_early = not trainer.done
            if main and trainer.ended_early:
                told = "ended after step %d: %d evaluations were not better (watch.patience)"
                logger.info(told, trainer.step, watch.patience)

    def steps_of(every: int | None) -> int:
        return trainer.parts.span.epoch_steps if every is None else every

    def due(every: int | None) -> bool:
        return steps_of(every) > 0 and trainer.step % steps_of(every) == 0

    new_best = False
    with logbook:
        if trainer.step == 0:
            measured = evaluate()
            if main and (cannot := unmeasured(trainer, measured.metrics)):
                logger.warning("%s", cannot)
        if measured.step == trainer.step:  # the logbook of a resumed run has dropped this line
            trainer.refresh_twin()
            note()
        for step, batches in () if trainer.done else trainer.steps():
            if step == 0 and main:
                parts, file = trainer.parts, out / FIRST_BATCH
                names = parts.data.label_names
                instruments.draw_first_batch(batches[0], mean=parts.mean, std=parts.std, file=file, label_names=names)
            metrics, stopped = trainer.do_step(step, batches, stop, out)
            logbook.step_done()
            if trainer.done or due(watch.log_every):
                logbook.log(step, metrics)
            with trainer.throughput.paused():
                if trainer.done or due(watch.eval_every):
                    measured = evaluate()
                    note()
                    new_best = new_best or measured.is_best
                if trainer.done or stopped or due(watch.save_every):
                    folder = save_run(out, writer, measured, published=publisher is not None)
                    if folder and publisher and not trainer.done:
                        publisher.submit(folder)
                        if new_best:
                            publisher.submit(out / BEST, branch=BEST)
                            new_best = False
            if stopped or trainer.done:
                break
    return measured


def _finished(recipe: Recipe, out: Path, publisher: Publisher | None) -> TrainResult | None:
    """The result of a run that was finished before; its model is published if that is asked for now.

    None if it was finished with fewer epochs, or less patience, than the recipe has.
    """
    told = told_by(out / MODEL)
    if told.run is None or told.run.step is None or told.run.total_steps is None:
        raise BundleError(f"{out / MODEL} does not say its steps: delete it and start the run again.")
    epochs, patience = told.run.recipe.get("epochs", recipe.epochs), told.run.recipe.get("watch", {}).get("patience", 0)
    if recipe.epochs > epochs or (recipe.watch.patience or math.inf) > (patience or math.inf):
        return None
    logger.info("the run in %s is finished", out)
    if publisher:
        settle(told.license, recipe.license, called=str(out / MODEL))
    metrics = {f"eval/{name}": value for name, value in told.metrics.items()}
    if told.run.start_score is not None:
        metrics[f"{AT_START}{score_of(recipe)}"] = told.run.start_score
    return TrainResult(
        folder=out,
        step=told.run.step,
        total_steps=told.run.total_steps,
        metrics=metrics,
        model=out / MODEL,
        best=read_best(out, recipe),
        commits=_commits(publisher, out, done=True),
    )


def _commits(publisher: Publisher | None, out: Path, *, done: bool) -> Mapping[str, str]:
    """Publish a finished run, or wait for the last checkpoint's uploads."""
    if publisher is None:
        return {}
    return publisher.publish_last(out) if done else publisher.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a run will cost, estimated from its first steps.

    Attributes:
        images_per_second: Of a usual step after the first ones, over all processes.
        eta_seconds: For the whole run, without evaluations, at the speed of the fastest and of the slowest step.
        memory_gib: In use on the device, or by this process if there is none.
    """

    steps: int
    images_per_second: float
    eta_seconds: tuple[float, float]
    memory_gib: float
    parameters: int


def dry_run(recipe: Recipe, *, clock: Callable[[], float] = time.perf_counter) -> DryRun:
    """Try the first steps of a run without writing anything.

    The first of them, which compile, tune and fill caches, are not timed. After about `DRY_SECONDS` it stops, once
    there is a step to tell of.

    Raises:
        RecipeError: The run has fewer steps than that.
        VitregError: As `train`.
    """
    require_start(recipe)
    with torch.random.fork_rng():
        trainer = Trainer(recipe, make_accelerator(recipe))
        total, batch_size = trainer.parts.span.total_steps, recipe.batch_size
        if total < 2:
            raise RecipeError(f"the whole run has {total} step: a dry run would have 2, so run it.")
        ends = [clock()]
        for step, batches in islice(trainer.steps(), sum(DRY_STEPS)):
            trainer.do_step(step, batches, StopEvent(), None)
            ends.append(clock())
            if len(ends) > 2 and max(gather_object([ends[-1] - ends[1]])) > DRY_SECONDS:
                break
        seconds = sorted(b - a for a, b in pairwise(ends[min(DRY_STEPS[0], len(ends) - 2) :]))
    return DryRun(
        steps=total,
        images_per_second=batch_size / median(seconds),
        eta_seconds=(total * seconds[0], total * seconds[-1]),
        memory_gib=trainer.throughput.read()["memory_gib"],
        parameters=sum(p.numel() for p in trainer.parts.task.network.parameters() if p.requires_grad),
    )


class StopEvent(threading.Event):
    """Set when the run is to stop after its current step; `by` is the signal that asked for it, if one did."""

    by: int | None = None


@contextmanager
def _stop_signals(*, patience: float) -> Iterator[StopEvent]:
    """An event that SIGTERM and Ctrl-C set while the context lasts; only the main thread can receive signals.

    Another Ctrl-C raises KeyboardInterrupt, if so many seconds have passed.
    """
    stop, owner, asked = StopEvent(), os.getpid(), [0.0]
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a worker that inherited this
            return
        if number == signal.SIGINT and stop.is_set() and time.monotonic() - asked[0] >= patience:
            raise KeyboardInterrupt
        if stop.is_set():
            return
        if number == signal.SIGINT:
            os.write(2, STOPPING)  # logging could be interrupted in the middle of another line
        stop.by, asked[0] = number, time.monotonic()
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
