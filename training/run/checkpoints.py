"""Checkpoints of a run: complete or absent, readable piece by piece, and enough to go on as if nothing had happened."""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitreg_hub.errors import TrainingError
from vitreg_hub.files import write_folder
from vitreg_hub.training.distributed.parallel import full_tensors, kept, load_full_state
from vitreg_hub.training.run.folders import restore_folders

logger = logging.getLogger(__name__)

CHECKPOINTS, STATE, STATE_FILE = "checkpoints", "state", "state.json"
NAME = re.compile(r"step_(\d+)")


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


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in (run / CHECKPOINTS).glob("step_*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


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
                save_file(whole, folder / f"{name}.safetensors", metadata={"format": "pt"})
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
