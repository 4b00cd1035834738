"""Checkpoints of a run: complete or absent, readable piece by piece, and enough to go on as if nothing had happened."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitreg_hub.errors import BundleError, TrainingError
from vitreg_hub.files import CONFIG_FILE, RECIPE_FILE, write_folder
from vitreg_hub.training.distributed.parallel import (
    full_optimizer_tensors,
    full_tensors,
    group_counts,
    kept,
    load_full_state,
    load_group_counts,
    load_optimizer_state,
)
from vitreg_hub.training.recipes.files import require_same_recipe
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.best import Best
from vitreg_hub.training.run.folders import CHECKPOINTS, MODEL, STATE, checkpoints, restore_folders, state_file
from vitreg_hub.training.run.measured import Measured
from vitreg_hub.training.run.trainer import Trainer

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Everything that a run changes.

    Attributes:
        step: Steps that are done.
        weights: Whole tensors by file: "backbone", "heads", "optimizer", and one for each frozen module.
        loaders: What each process's loader says of its place in the data.
        extra: Other numbers, JSON-safe.
    """

    step: int
    weights: Mapping[str, Mapping[str, Tensor]]
    loaders: tuple[dict[str, Any], ...]
    extra: Mapping[str, Any]


def split_weights(network: nn.Module, frozen: Mapping[str, nn.Module], *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Whole weights of a task by file; all processes must ask for them.

    Args:
        network: What is trained.
        frozen: Modules beside it.
        keep: Whether this process is the one that gets them.

    Returns:
        "backbone" under the ViT's own names, "heads" with everything else of the network, and one entry for each frozen
        module under the network's names.
    """
    whole = kept(full_tensors(network), keep=keep)
    files = {
        "backbone": {name.removeprefix("backbone."): t for name, t in whole.items() if name.startswith("backbone.")},
        "heads": {name: t for name, t in whole.items() if not name.startswith("backbone.")},
    }
    return files | {name: kept(full_tensors(module), keep=keep) for name, module in frozen.items()}


def load_weights(
    network: nn.Module, frozen: Mapping[str, nn.Module], files: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write what `split_weights` gave into a task's modules."""
    backbone = {f"backbone.{name}": tensor for name, tensor in files["backbone"].items()}
    load_full_state(network, backbone | dict(files.get("heads", {})))
    for name, module in frozen.items():
        load_full_state(module, files.get(name, {}))


def find_checkpoint(out: Path, recipe: Recipe, resume: str) -> Path | None:
    """The checkpoint that a run goes on from, after a look at whose it is.

    Args:
        out: The run's folder, which may not exist yet.
        recipe: The run.
        resume: As `train` takes it.

    Raises:
        RecipeError: The folder holds a run of another recipe.
        BundleError: The folder holds something else, or is to be new and is not.
        TrainingError: There is no such checkpoint.
    """
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None:
        if not (named / STATE).is_dir():
            raise TrainingError(f"--resume {resume}: that is no checkpoint; give a run's checkpoints/step_... folder.")
        run = named.absolute().parents[1]
        if (run / RECIPE_FILE).is_file():
            require_same_recipe(recipe, run)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return named
    is_run = (out / RECIPE_FILE).is_file() and not (out / CONFIG_FILE).exists()  # a bundle has a public recipe beside
    if resume == "never" or not is_run:
        why = "is not to be resumed" if resume == "never" else "holds no run"
        raise BundleError(f"{out} exists and {why}: choose another folder.")
    require_same_recipe(recipe, out)
    found = checkpoints(out)
    if named is None:
        return found[-1] if found else None
    if (out / MODEL).exists() or any(path.name > named.name for path in found):
        raise BundleError(f"{out} is further than {named.name}: go on from there in another folder.")
    return named


def save_run(
    out: Path, trainer: Trainer, measured: Measured, *, seconds: float, write_model: Callable[[Path], None]
) -> Path | None:
    """Write a checkpoint of a run, together with all processes; returns its folder on the main one.

    Args:
        out: The run's folder.
        trainer: Its weights and its place in the data.
        measured: What was measured on the way.
        seconds: That the run took so far.
        write_model: As `save_checkpoint` takes it.

    Raises:
        TrainingError: A weight is no number; all earlier checkpoints stay.
        BundleError: It cannot be written; all earlier ones stay.
    """
    task, accelerator, optimizer = trainer.parts.task, trainer.accelerator, trainer.optimizer.optimizer
    main = accelerator.is_main_process
    weights = split_weights(task.network, task.frozen, keep=main)
    weights["optimizer"] = kept(full_optimizer_tensors(optimizer, trainer.names), keep=main)
    loaders = tuple(gather_object([trainer.parts.loader.state()]))
    extra = {
        "metrics": dict(measured.metrics),
        "evaluated": measured.step,
        "best": asdict(measured.best) if measured.best else None,
        "seconds": seconds,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
        "groups": group_counts(optimizer),
        "length": trainer.length,
    }
    trainer.refresh_twin()
    folder = None
    if main:
        state = RunState(step=trainer.step, weights=weights, loaders=loaders, extra=extra)
        folder = save_checkpoint(out, state, write_model=write_model, keep=trainer.recipe.watch.keep)
    accelerator.wait_for_everyone()
    return folder


def restore_run(trainer: Trainer, checkpoint: Path) -> tuple[Measured, float]:
    """Go back to where a checkpoint was written.

    Returns:
        What was measured until there, and the seconds that it took.

    Raises:
        TrainingError: It is damaged, or of other data, another network or another number of processes.
    """
    state = load_checkpoint(checkpoint)
    task, accelerator, optimizer, extra = (
        trainer.parts.task,
        trainer.accelerator,
        trainer.optimizer.optimizer,
        state.extra,
    )
    if extra["length"] != trainer.length:
        before, now = (f"{x['images']} images and {x['steps']} steps" for x in (extra["length"], trainer.length))
        raise TrainingError(f"{checkpoint} is of a run with {before}, but this one has {now}: give it the same data.")
    try:
        load_weights(task.network, task.frozen, state.weights)
        load_optimizer_state(optimizer, trainer.names, state.weights.get("optimizer", {}))
        load_group_counts(optimizer, extra["groups"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{checkpoint} is of another network ({error}): give its own run's folder.") from error
    trainer.parts.loader.load_state(state.loaders)
    if accelerator.scaler and extra["scaler"]:
        accelerator.scaler.load_state_dict(extra["scaler"])
    trainer.go_on_from(state.step)
    best = Best(**extra["best"]) if extra.get("best") else None
    measured = Measured(step=extra["evaluated"], metrics=dict(extra["metrics"]), best=best)
    return measured, extra.get("seconds", 0.0)


def save_checkpoint(run: Path, state: RunState, *, write_model: Callable[[Path], None], keep: int) -> Path:
    """Write a checkpoint, then delete the oldest ones; on the main process only.

    Args:
        run: The run's folder.
        state: What is saved.
        write_model: Writes the bundle of the model that would be published into the folder it is given.
        keep: How many checkpoints may stay.

    Raises:
        TrainingError: A weight is no number; all earlier checkpoints stay.
        BundleError: It cannot be written; all earlier ones stay.
    """
    for file, tensors in state.weights.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} of {file} holds what is no number after {state.step} steps, so no checkpoint is written: "
                    "lower optim.lr or set optim.clip, and go on from the last one."
                )

    def fill(staging: Path) -> None:
        write_model(staging)
        folder = staging / STATE
        folder.mkdir()
        for name, tensors in state.weights.items():
            if tensors:
                whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(whole, state_file(staging, name), metadata={"format": "pt"})
        text = {"step": state.step, "loaders": state.loaders, "extra": dict(state.extra)}
        (folder / STATE_FILE).write_text(json.dumps(text), encoding="utf-8")

    target = run / CHECKPOINTS / f"step_{state.step:07d}"
    if not target.exists():  # it does if the last step of a run that went on from it is the one it holds
        write_folder(target, fill)
    for old in checkpoints(run)[:-keep]:
        _remove(old)
    return target


def load_checkpoint(folder: Path) -> RunState:
    """Read a checkpoint.

    Raises:
        TrainingError: It is none, or damaged.
    """
    try:
        text = json.loads((folder / STATE / STATE_FILE).read_text(encoding="utf-8"))
        weights = {path.stem: load_file(path) for path in sorted((folder / STATE).glob("*.safetensors"))}
        return RunState(step=text["step"], weights=weights, loaders=tuple(text["loaders"]), extra=text["extra"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"{folder} is no checkpoint that a run can go on from ({error}): delete it to go on from the one before."
        ) from error


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process was about to write or to delete."""
    restore_folders(run)
    for path in (run / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(path)
        logger.info("deleted %s, which an earlier process had left unfinished", path)


def _remove(folder: Path) -> None:
    """A checkpoint that is half deleted must not look complete."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
