"""The folders of bundles in that of a run, and how a new one takes the place of an old one."""

import shutil
from pathlib import Path

from vitreg_hub.files import OLD, SWAP

MODEL, BEST = "model", "best"
"""The last weights and the best ones; the latter also is their branch on the Hub."""


def restore_folders(run: Path) -> None:
    """Undo what a process was killed in while it replaced a folder, and delete the copies that it had made of some."""
    for swap in run.glob(f".*{SWAP}"):
        target = run / swap.name.removeprefix(".").removesuffix(SWAP)
        if (swap / OLD).exists() and not target.exists():
            (swap / OLD).rename(target)
        shutil.rmtree(swap)
    for copy in (*run.glob(f".{MODEL}-*"), *run.glob(f".{BEST}-*")):
        shutil.rmtree(copy)
