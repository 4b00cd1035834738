"""What the folder of a run contains: bundles, which newer ones replace, checkpoints, and what a killed process left."""

import logging
import re
import shutil
from pathlib import Path

from vitreg_hub.errors import BundleError
from vitreg_hub.files import CURVES_FIGURE, METRICS_FILE, OLD, RECIPE_FILE, SWAP, TOWER_SUFFIX

logger = logging.getLogger(__name__)

MODEL, BEST = "model", "best"
"""Folders of the last and of the best weights; the latter is also the name of their branch on the Hub."""
CHECKPOINTS, STATE = "checkpoints", "state"
"""The folder of checkpoints, and the folder in each of them beside its bundle."""
FIRST_BATCH = "first_batch.png"
LOCK = ".lock"
"""Held by the run that uses the folder."""
STEP = re.compile(r"step_(\d+)")
WRITTEN = "|".join(map(re.escape, (RECIPE_FILE, METRICS_FILE, CURVES_FIGURE, FIRST_BATCH, MODEL, BEST)))
LEFT = re.compile(rf"\.(?:({WRITTEN})({TOWER_SUFFIX})?|step_\d+)-(\w{{8}}|{SWAP[1:]}|{OLD})")
"""Hidden folders in which files and folders of a run are written before they get their names, or deleted after."""


def state_file(checkpoint: Path, name: str) -> Path:
    """File in which a checkpoint keeps the weights of one part of the state."""
    return checkpoint / STATE / f"{name}.safetensors"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in (run / CHECKPOINTS).glob("step_*") if (match := STEP.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def leftovers(folder: Path) -> list[Path]:
    """Hidden folders that a killed process has left in the folder of a run, or of its checkpoints."""
    return [path for path in folder.glob(".*") if LEFT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def is_new(run: Path) -> bool:
    """Whether a folder is to become a run: there is none, or nothing in it but what a killed process left at once."""
    if not run.exists():
        return True
    return run.is_dir() and {*run.iterdir()} <= {run / LOCK, *leftovers(run)}


def clear_leftovers(run: Path) -> None:
    """Restore folders that a killed process was replacing, and delete what it was writing or deleting.

    Raises:
        BundleError: That cannot be done.
    """
    try:
        for path in (*leftovers(run), *leftovers(run / CHECKPOINTS)):
            target = path.with_name(path.name.removeprefix(".").removesuffix(SWAP))
            if (path / OLD).exists() and not target.exists():
                (path / OLD).rename(target)
            shutil.rmtree(path)
            logger.info("deleted %s, which an earlier process had left unfinished", path)
    except OSError as error:
        raise BundleError(f"cannot write to {run}: {error.strerror or error}.") from error
