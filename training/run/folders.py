"""What is in the folder of a run: bundles, which new ones take the place of, and checkpoints."""

import re
import shutil
from pathlib import Path

from vitreg_hub.files import OLD, SWAP

MODEL, BEST = "model", "best"
"""The last weights and the best ones; the latter also is their branch on the Hub."""
CHECKPOINTS, STATE = "checkpoints", "state"
"""Where checkpoints are, and what each of them holds beside its bundle."""
STEP = re.compile(r"step_(\d+)")


def state_file(checkpoint: Path, name: str) -> Path:
    """Where a checkpoint keeps the weights of a part of the state."""
    return checkpoint / STATE / f"{name}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in (run / CHECKPOINTS).glob("step_*") if (match := STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def restore_folders(run: Path) -> None:
    """Undo what a process was killed in while it replaced a folder, and delete the copies that it had made of some."""
    for swap in run.glob(f".*{SWAP}"):
        target = run / swap.name.removeprefix(".").removesuffix(SWAP)
        if (swap / OLD).exists() and not target.exists():
            (swap / OLD).rename(target)
        shutil.rmtree(swap)
    for copy in (*run.glob(f".{MODEL}-*"), *run.glob(f".{BEST}-*")):
        shutil.rmtree(copy)
