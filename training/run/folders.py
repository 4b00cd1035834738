"""What the folder of a run contains: bundles, which newer ones replace, and checkpoints."""

import re
import shutil
from pathlib import Path

from vitreg_hub.files import OLD, SWAP

MODEL, BEST = "model", "best"
"""Folders of the last and of the best weights; the latter is also the name of their branch on the Hub."""
CHECKPOINTS, STATE = "checkpoints", "state"
"""The folder of checkpoints, and the folder in each of them beside its bundle."""
STEP = re.compile(r"step_(\d+)")


def state_file(checkpoint: Path, name: str) -> Path:
    """File in which a checkpoint keeps the weights of one part of the state."""
    return checkpoint / STATE / f"{name}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in (run / CHECKPOINTS).glob("step_*") if (match := STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def restore_folders(run: Path) -> None:
    """Restore folders that a killed process was replacing, and delete the copies it had made."""
    for swap in run.glob(f".*{SWAP}"):
        target = run / swap.name.removeprefix(".").removesuffix(SWAP)
        if (swap / OLD).exists() and not target.exists():
            (swap / OLD).rename(target)
        shutil.rmtree(swap)
    for copy in (*run.glob(f".{MODEL}-*"), *run.glob(f".{BEST}-*")):
        shutil.rmtree(copy)
