"""The one loop of all tasks: steps, and what is written down, measured, saved and published between them."""

import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object

from vitreg_hub.bundle.config import read_config
from vitreg_hub.bundle.provenance import provenance_from_json
from vitreg_hub.errors import BundleError, HubError, RecipeError, TrainingError
from vitreg_hub.files import CONFIG_FILE, RECIPE_FILE
from vitreg_hub.licenses import settle
from vitreg_hub.training.recipes.files import require_same_recipe, write_recipe
from vitreg_hub.training.recipes.settings import Recipe, require_start, to_dict
from vitreg_hub.training.run import checkpoints as run_state
from vitreg_hub.training.run.assembly import make_accelerator
from vitreg_hub.training.run.best import Best, read_best
from vitreg_hub.training.run.folders import BEST, MODEL, restore_folders
from vitreg_hub.training.run.origins import license_of
from vitreg_hub.training.run.publisher import MAIN, Publisher
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.watch.logbook import Logbook, require_trackers
from vitreg_hub.training.watch.throughput import Throughput

logger = logging.getLogger(__name__)

FIRST_BATCH = "first_batch.png"
DRY_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """Where a run got to.

    Attributes:
        folder: The run's folder.
        step: Steps that are done.
        total_steps: Steps of the whole run.
        metrics: The last evaluation.
        model: Folder of the bundle; None if the run is not finished.
        best: What the folder `best` holds, if there was an evaluation.
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


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: str = "auto",
    push: str | None = None,
    push_every: Literal["end", "save"] = "end",
    private: bool = False,
) -> TrainResult:
    """Train what a recipe says, or go on where an earlier process stopped.

    Everything random follows from the seed, the step and the place in the global batch, so a run that was killed ends
    with the weights of one that was not. On SIGTERM a checkpoint is written and the function returns.

    Args:
        recipe: The run.
        out: Its folder: `recipe.yaml`, `metrics.jsonl`, `first_batch.png`, `checkpoints`, from the first evaluation on
            `best`, and at the end `curves.png` and `model`.
        resume: "auto" goes on from the newest checkpoint in `out`, if there is one; "never" wants a new folder; else a
            checkpoint's folder.
        push: ``org/name`` that bundles are published under, in the background: the last one on the branch main, the
            best one on the branch best.
        push_every: Whether that is done at every checkpoint, or at the end only.
        private: Whether a new repository can be seen by its owner alone.

    Raises:
        RecipeError: Settings contradict each other, the data, the processes, or the run in `out`.
        LicenseError: The recipe contradicts its start or its teacher, or is to be published and nobody says under which
            license.
        DataError: The images cannot be used.
        TrainingError: The loss is no number any more; the last checkpoint stays.
        BundleError: `out` cannot be written to; what is complete in it stays.
        HubError: The Hub says at the start that it will not take the run's models; or the last one could not be
            published, and `out` is complete.
    """
    out = Path(out)
    require_start(recipe)
    require_trackers(recipe.watch.trackers)
    accelerator = make_accelerator(recipe)
    checkpoint = _checkpoint_to_resume(out, recipe, resume)
    found = gather_object([checkpoint.name if checkpoint else None])  # before one of them writes anything
    if len(set(found)) > 1:
        raise BundleError(
            f"not all processes see the same checkpoints in {out}: give a folder that all machines share."
        )
    publisher = None
    if push and accelerator.is_main_process:
        publisher = Publisher(push, private=private, license=recipe.license)  # fails now if there is no token
        publisher.ask(towers=isinstance(recipe.task, Contrastive))
    if (out / MODEL).exists():
        return _finished(recipe, out, publisher)
    with torch.random.fork_rng(), publisher or nullcontext():
        trainer = Trainer(recipe, accelerator)
        license_of(recipe, trainer.parts.sources, published=push is not None)
        if checkpoint is not None:
            trainer.restore(run_state.load_checkpoint(checkpoint), called=checkpoint)
        if accelerator.is_main_process:
            write_recipe(recipe, out)
            run_state.clear_leftovers(out)
            trainer.reconcile_best(read_best(out, recipe))
        with _stop_signal() as stop:
            _loop(trainer, out, stop, publisher if push_every == "save" else None)
        return _finish(trainer, out, publisher)


def _loop(trainer: Trainer, out: Path, stop: threading.Event, publisher: Publisher | None) -> None:
    """Go on to the last step, or until `stop` is set in one of the processes."""
    recipe, watch, total = trainer.recipe, trainer.recipe.watch, trainer.parts.span.total_steps
    logbook = Logbook(
        folder=out,
        accelerator=trainer.accelerator,
        total_steps=total,
        start_step=trainer.step,
        batch_size=recipe.batch_size,
        name=recipe.name,
        trackers=watch.trackers,
        config=to_dict(recipe),
    )
    new_best = False
    with logbook:
        if trainer.step == 0:
            trainer.evaluate()
        if trainer.evaluated == trainer.step:  # a resumed run drops the lines of its first step
            trainer.refresh_twin()
            _evaluated(trainer, logbook, out)
        for step, batches in trainer.steps(logbook.throughput):
            if step == 0 and trainer.accelerator.is_main_process:
                trainer.draw(batches[0], out / FIRST_BATCH)
            metrics, stopped = trainer.do_step(step, batches, logbook.throughput, stop, out)
            logbook.step_done()
            done = trainer.step == total
            if done or trainer.step % watch.log_every == 0:
                logbook.log(step, metrics)
            with logbook.throughput.paused():
                if done or (watch.eval_every and trainer.step % watch.eval_every == 0):
                    trainer.evaluate()
                    new_best |= _evaluated(trainer, logbook, out)
                if done or stopped or (watch.save_every and trainer.step % watch.save_every == 0):
                    folder = trainer.save(out, published=publisher is not None)
                    if publisher and not done:
                        publisher.submit(folder)
                        if new_best:
                            publisher.submit(out / BEST, branch=BEST)
                            new_best = False
            if stopped:
                break


def _evaluated(trainer: Trainer, logbook: Logbook, out: Path) -> bool:
    """Write down an evaluation and, if no model was better so far, this one; tells which."""
    is_best = trainer.best is not None and trainer.best.step == trainer.step
    logbook.note(trainer.step, trainer.metrics, best=is_best)
    if is_best and trainer.accelerator.is_main_process:
        trainer.write_model(out / BEST, run=out, best=trainer.best)
    return is_best


def _finish(trainer: Trainer, out: Path, publisher: Publisher | None) -> TrainResult:
    """Write the model, if the run is done, and wait for what is being published."""
    total = trainer.parts.span.total_steps
    done = trainer.step == total
    if done:
        trainer.refresh_twin()  # a run that was killed after its last step has not done so
        if trainer.accelerator.is_main_process:
            trainer.write_model(out / MODEL, run=out)
    trainer.accelerator.wait_for_everyone()  # for uploads only the main process waits
    return TrainResult(
        folder=out,
        step=trainer.step,
        total_steps=total,
        metrics=trainer.metrics,
        model=out / MODEL if done else None,
        best=read_best(out, trainer.recipe),
        commits=_publish(out, publisher, done=done),
    )


def _finished(recipe: Recipe, out: Path, publisher: Publisher | None) -> TrainResult:
    """What a run came to that was finished before; its model is published if that is asked for now."""
    logger.info("the run in %s is finished", out)
    told = provenance_from_json(read_config(out / MODEL, called=str(out / MODEL))["vitreg"].get("provenance"))
    if told.run is None:
        raise BundleError(f"{out / MODEL} does not tell its steps: delete it and start the run again.")
    if publisher:
        restore_folders(out)
        settle(told.license, recipe.license, called=str(out / MODEL))
    return TrainResult(
        folder=out,
        step=told.run.step,
        total_steps=told.run.total_steps,
        metrics={f"eval/{name}": value for name, value in told.metrics.items()},
        model=out / MODEL,
        best=read_best(out, recipe),
        commits=_publish(out, publisher),
    )


def _publish(out: Path, publisher: Publisher | None, *, done: bool = True) -> dict[str, str]:
    """Publish the last and the best model of a run that is done, and wait for it, or for a stopped run's checkpoints.

    Returns:
        Address of the last commit on each branch where nothing newer failed.

    Raises:
        HubError: The last model could not be published.
    """
    if publisher is None:
        return {}
    folders = {MAIN: out / MODEL, BEST: out / BEST}
    for branch, folder in folders.items():
        if done and folder.is_dir():
            publisher.submit(folder, branch=branch)
    commits, errors = publisher.close(), publisher.errors
    if not done:
        return commits
    commands = {branch: publisher.by_hand(folders[branch], branch=branch) for branch in errors}
    if BEST in errors:
        logger.error("%s is not on the Hub (%s): %s", folders[BEST], errors[BEST].rstrip("."), commands[BEST])
    if MAIN in errors:
        older = {MAIN: "an older checkpoint", BEST: "the best model" if BEST in commits else "an older best model"}
        there = [f"{older[branch]} on {branch} ({commit})" for branch, commit in publisher.commits.items()]
        what = f"{folders[MAIN]} could not be published" if there else "nothing could be published"
        raise HubError(
            f"{what} ({errors[MAIN].rstrip('.')}){', only ' * bool(there)}{' and '.join(there)}: "
            f"{out} is complete, send it with `{commands[MAIN]}`."
        )
    return commits


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What a run will take, from its first steps.

    Attributes:
        steps: Steps of the whole run.
        images_per_second: Of the last step that was tried, over all processes.
        eta_seconds: Of the whole run, without evaluations.
        memory_gib: Of the device, or without one of this process.
        parameters: Numbers that are trained.
    """

    steps: int
    images_per_second: float
    eta_seconds: float
    memory_gib: float
    parameters: int


def dry_run(recipe: Recipe) -> DryRun:
    """Try the first steps of a run, and write nothing.

    Raises:
        RecipeError: The run is as short as that.
        VitregError: As `train`.
    """
    require_start(recipe)
    with torch.random.fork_rng():
        trainer = Trainer(recipe, make_accelerator(recipe))
        total, batch_size = trainer.parts.span.total_steps, recipe.batch_size
        if total < DRY_STEPS:
            raise RecipeError(f"the whole run has {total} step: a dry run would have {DRY_STEPS}, so run it.")
        throughput = Throughput(
            batch_size=batch_size,
            total_steps=total,
            device=trainer.accelerator.device,
            precision=trainer.accelerator.mixed_precision,
        )
        for step, batches in islice(trainer.steps(throughput), DRY_STEPS):
            trainer.do_step(step, batches, throughput, threading.Event(), None)
            throughput.step_done()
        measured = throughput.read()
    return DryRun(
        steps=total,
        images_per_second=measured["images_per_second"],
        eta_seconds=total * batch_size / measured["images_per_second"],
        memory_gib=measured["memory_gib"],
        parameters=sum(p.numel() for p in trainer.parts.task.network.parameters() if p.requires_grad),
    )


def _checkpoint_to_resume(out: Path, recipe: Recipe, resume: str) -> Path | None:
    """The checkpoint that a run goes on from, after a look at whose it is.

    Raises:
        RecipeError: The folder holds a run of another recipe.
        BundleError: The folder holds something else, or is to be new and is not.
        TrainingError: There is no such checkpoint.
    """
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None:
        if not (named / run_state.STATE).is_dir():
            raise TrainingError(f"--resume {resume}: that is no checkpoint; give a run's checkpoints/step_... folder.")
        run = named.absolute().parents[1]
        if (run / RECIPE_FILE).is_file():
            require_same_recipe(recipe, run)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return named
    is_run = (out / RECIPE_FILE).is_file() and not (out / CONFIG_FILE).exists()  # a bundle has a public recipe beside
    if resume == "never" or not is_run:
        raise BundleError(
            f"{out} exists and "
            + ("is not to be resumed" if resume == "never" else "holds no run")
            + ": choose another folder."
        )
    require_same_recipe(recipe, out)
    found = run_state.checkpoints(out)
    if named is None:
        return found[-1] if found else None
    if (out / MODEL).exists() or any(path.name > named.name for path in found):
        raise BundleError(f"{out} is further than {named.name}: go on from there in another folder.")
    return named


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, for as long as the context lasts; signals reach main threads only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
