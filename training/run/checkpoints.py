"""Checkpoints of a run: complete or absent, and enough to go on as if nothing had happened."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from accelerate.utils import gather_object
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from vitreg_hub import typed
from vitreg_hub.errors import BundleError, TrainingError, readable
from vitreg_hub.files import CONFIG_FILE, METRICS_FILE, RECIPE_FILE, new_folder, require_name, synced
from vitreg_hub.training.data.loader import LoaderState
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
from vitreg_hub.training.run.folders import CHECKPOINTS, MODEL, STATE, STEP, checkpoints, is_new
from vitreg_hub.training.run.measured import Best, Measured
from vitreg_hub.training.run.model_folder import ModelWriter
from vitreg_hub.training.run.state import read_state, read_tensors, write_state
from vitreg_hub.training.run.trainer import Trainer

BACKBONE = "backbone."
"""What the names of the ViT's weights begin with in a task's network."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Length:
    images: int | None
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extra:
    """See `save_run`."""

    metrics: Mapping[str, float]
    evaluated: int
    best: Best | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0
    scaler: Mapping[str, int | float] = field(default_factory=dict)
    groups: tuple[Mapping[str, int | float | tuple[int | float, str]], ...]
    length: _Length


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The content of a checkpoint's state.json; those of older versions have no checksums of the other files."""

    step: Annotated[int, Field(ge=0)]
    loaders: Annotated[tuple[LoaderState, ...], Field(min_length=1)]
    extra: _Extra
    files: Mapping[str, str] | None = None


def find_checkpoint(out: Path, recipe: Recipe, resume: str) -> Path | None:
    """Find the checkpoint that a run goes on from, and check that it belongs to this run; `resume` as for `train`.

    Raises:
        RecipeError: The folder holds a run of another recipe.
        BundleError: The folder holds something else, or must be new and is not, or cannot be read.
        TrainingError: There is no such checkpoint.
    """
    require_name(out)
    named = None if resume in ("auto", "never") else Path(resume)
    with readable(out if named is None else named):
        if named is not None:
            if not (named / STATE).is_dir():
                raise TrainingError(
                    f"--resume {resume}: that is no checkpoint; give a run's checkpoints/step_... folder."
                )
            run = named.absolute().parent.parent
            if (run / RECIPE_FILE).is_file():
                require_same_recipe(recipe, run)
        if is_new(out):
            return named
        is_run = (out / RECIPE_FILE).is_file() and not (out / CONFIG_FILE).exists()  # a bundle has a recipe too
        if resume == "never" or not is_run:
            why = "is not to be resumed" if resume == "never" else "holds no run"
            raise BundleError(f"{out} exists and {why}: choose another folder.")
        require_same_recipe(recipe, out)
        found = checkpoints(out)
        for path in (out / CHECKPOINTS, *found):
            if path.exists() and not path.is_dir():
                raise BundleError(f"{path} is a file in the place of a folder: delete it and start the run again.")
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
                if (out / METRICS_FILE).is_file():
                    synced(out / METRICS_FILE)
                writer.fill(staging, writer.bundle(measured), run=out if published else None)
                write_state(staging, weights, state)
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
        state, weights = _read(checkpoint)
        has_state = optimizer.param_groups[0].get("momentum", 1)  # plain SGD has none
        if state.files is None and state.step and has_state and "optimizer" not in weights:
            raise ValueError("the file of the optimizer's state is missing")
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{checkpoint} is no checkpoint that a run can go on from ({str(error).rstrip('.')}): delete it to go on "
            "from the one before."
        ) from error
    extra = state.extra
    if extra.length.images != trainer.length["images"] or state.step > trainer.parts.span.total_steps:
        before, now = (f"{x['images']} images and {x['steps']} steps" for x in (asdict(extra.length), trainer.length))
        raise TrainingError(f"{checkpoint} is of a run with {before}, but this one has {now}: give it the same data.")
    try:
        backbone = {f"{BACKBONE}{name}": tensor for name, tensor in weights["backbone"].items()}
        load_full_state(task.network, backbone | weights.get("heads", {}))
        for name, module in task.frozen.items():
            load_full_state(module, weights.get(name, {}))
        load_optimizer_state(optimizer, trainer.names, weights.get("optimizer", {}))
        load_group_counts(optimizer, extra.groups)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise TrainingError(f"{checkpoint} is of another network ({error}): give its own run's folder.") from error
    trainer.parts.loader.load_state([asdict(loader) for loader in state.loaders])
    if accelerator.scaler and extra.scaler:
        accelerator.scaler.load_state_dict(dict(extra.scaler))
    trainer.go_on_from(state.step, seconds=extra.seconds)
    return Measured(step=extra.evaluated, metrics=extra.metrics, best=extra.best)


def _read(checkpoint: Path) -> tuple[_State, dict[str, dict[str, Tensor]]]:
    """The state of a checkpoint, and its tensors by file. Raises what `restore_run` puts into a sentence."""
    state, folder = typed.read(_State, read_state(checkpoint)), checkpoint / STATE
    if (match := STEP.fullmatch(checkpoint.name)) and int(match[1]) != state.step:
        raise ValueError(f"its state is that of step {state.step}")
    if state.step > state.extra.length.steps:
        raise ValueError(f"its run has only {state.extra.length.steps} steps")
    files = sorted(folder.glob("*.safetensors")) if state.files is None else [folder / name for name in state.files]
    return state, read_tensors(files, state.files)


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
