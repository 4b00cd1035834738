"""Checkpoints of a run: complete or absent, and enough to go on as if nothing had happened."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg_hub.errors import BundleError, TrainingError
from vitreg_hub.files import CONFIG_FILE, RECIPE_FILE, new_folder
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
from vitreg_hub.training.run.folders import CHECKPOINTS, MODEL, STATE, checkpoints, restore_folders, state_file
from vitreg_hub.training.run.measured import Best, Measured
from vitreg_hub.training.run.model_folder import ModelWriter
from vitreg_hub.training.run.trainer import Trainer

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
BACKBONE = "backbone."
"""What the names of the ViT's weights begin with in a task's network."""


def find_checkpoint(out: Path, recipe: Recipe, resume: str) -> Path | None:
    """Find the checkpoint that a run goes on from, and check that it belongs to this run; `resume` as for `train`.

    Raises:
        RecipeError: The folder holds a run of another recipe.
        BundleError: The folder holds something else, or must be new and is not.
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
    is_run = (out / RECIPE_FILE).is_file() and not (out / CONFIG_FILE).exists()  # a bundle has a recipe too
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


def save_run(out: Path, writer: ModelWriter, measured: Measured, *, published: bool) -> Path | None:
    """Write a checkpoint and delete the oldest ones, in all processes together.

    A checkpoint that is to be published has a bundle that shows how the run went.

    Returns:
        The checkpoint's folder on the main process, None on the others.

    Raises:
        TrainingError: A weight is not finite; all earlier checkpoints stay.
        BundleError: It cannot be written; all earlier ones stay.
    """
    trainer, accelerator = writer.trainer, writer.trainer.accelerator
    weights = _whole_weights(trainer)
    state = {
        "step": trainer.step,
        "loaders": gather_object([trainer.parts.loader.state()]),
        "extra": {
            "metrics": dict(measured.metrics),
            "evaluated": measured.step,
            "best": asdict(measured.best) if measured.best else None,
            "seconds": trainer.seconds,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            "groups": group_counts(trainer.optimizer.optimizer),
            "length": trainer.length,
        },
    }
    trainer.refresh_twin()
    folder = None
    if accelerator.is_main_process:
        _require_finite(weights, trainer.step)
        folder = out / CHECKPOINTS / f"step_{trainer.step:07d}"
        if not folder.exists():  # it does when a run resumes at its last step
            with new_folder(folder) as staging:
                writer.fill(staging, writer.bundle(measured), run=out if published else None)
                _write_state(staging, weights, state)
        for old in checkpoints(out)[: -trainer.recipe.watch.keep]:
            # renamed first, so that it never looks complete when it is half deleted
            shutil.rmtree(old.rename(old.with_name(f".{old.name}-old")))
    accelerator.wait_for_everyone()
    return folder


def restore_run(trainer: Trainer, checkpoint: Path) -> Measured:
    """Go back to where a checkpoint was written; returns what had been measured by then.

    Raises:
        TrainingError: It is damaged, or of other data, another network or another number of processes.
    """
    task, accelerator, optimizer = trainer.parts.task, trainer.accelerator, trainer.optimizer.optimizer
    try:
        state = json.loads((checkpoint / STATE / STATE_FILE).read_text(encoding="utf-8"))
        step, loaders, extra = state["step"], state["loaders"], state["extra"]
        weights = {path.stem: load_file(path) for path in sorted((checkpoint / STATE).glob("*.safetensors"))}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"{checkpoint} is no checkpoint that a run can go on from ({error}): delete it to go on from the one "
            "before."
        ) from error
    if extra["length"]["images"] != trainer.length["images"] or step > trainer.parts.span.total_steps:
        before, now = (f"{x['images']} images and {x['steps']} steps" for x in (extra["length"], trainer.length))
        raise TrainingError(f"{checkpoint} is of a run with {before}, but this one has {now}: give it the same data.")
    try:
        backbone = {f"{BACKBONE}{name}": tensor for name, tensor in weights["backbone"].items()}
        load_full_state(task.network, backbone | weights.get("heads", {}))
        for name, module in task.frozen.items():
            load_full_state(module, weights.get(name, {}))
        load_optimizer_state(optimizer, trainer.names, weights.get("optimizer", {}))
        load_group_counts(optimizer, extra["groups"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{checkpoint} is of another network ({error}): give its own run's folder.") from error
    trainer.parts.loader.load_state(loaders)
    if accelerator.scaler and extra["scaler"]:
        accelerator.scaler.load_state_dict(extra["scaler"])
    trainer.go_on_from(step, seconds=extra.get("seconds", 0.0))
    best = Best(**extra["best"]) if extra.get("best") else None
    return Measured(step=extra["evaluated"], metrics=extra["metrics"], best=best)


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    restore_folders(run)
    for path in (run / CHECKPOINTS).glob(".step_*"):
        shutil.rmtree(path)
        logger.info("deleted %s, which an earlier process had left unfinished", path)


def _whole_weights(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by file, empty except on the main process; all processes must ask for them."""
    task, keep = trainer.parts.task, trainer.accelerator.is_main_process
    whole = kept(full_tensors(task.network), keep=keep)
    files = {
        "backbone": {name.removeprefix(BACKBONE): x for name, x in whole.items() if name.startswith(BACKBONE)},
        "heads": {name: x for name, x in whole.items() if not name.startswith(BACKBONE)},
    }
    for name, module in task.frozen.items():
        files[name] = kept(full_tensors(module), keep=keep)
    files["optimizer"] = kept(full_optimizer_tensors(trainer.optimizer.optimizer, trainer.names), keep=keep)
    return files


def _require_finite(weights: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    for file, tensors in weights.items():
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise TrainingError(
                    f"{name} of {file} is not finite after {step} steps, so no checkpoint is written: lower optim.lr "
                    "or set optim.clip, and go on from the last one."
                )


def _write_state(checkpoint: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    (checkpoint / STATE).mkdir()
    for name, tensors in weights.items():
        if tensors:
            whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(whole, state_file(checkpoint, name), metadata={"format": "pt"})
    (checkpoint / STATE / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
