"""The folders of bundles in that of a run, and how a new one takes the place of an old one."""

import shutil
from collections.abc import Callable
from pathlib import Path

from vitreg_hub.errors import BundleError

MODEL, BEST = "model", "best"
"""The last weights and the best ones; the latter also is their branch on the Hub."""
SWAP, NEW, OLD = "-swap", "new", "old"


def replace_folder(target: Path, write: Callable[[Path], object]) -> Path:
    """Put a new folder in the place of an old one, if there is one.

    No portable call exchanges two folders. Whoever is killed between the two renames leaves both of them complete, and
    `restore_folders` puts the old one back.

    Args:
        target: The folder.
        write: Writes a folder that does not exist yet, complete or not at all.

    Raises:
        BundleError: It cannot be written; the old one stays.
    """
    swap = target.with_name(f".{target.name}{SWAP}")
    try:
        if swap.exists():
            shutil.rmtree(swap)
        write(swap / NEW)
        if target.exists():
            target.rename(swap / OLD)
        (swap / NEW).rename(target)
        shutil.rmtree(swap)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}.") from error
    return target


def restore_folders(run: Path) -> None:
    """Undo what a process was killed in while it replaced a folder, and delete the copies that it had made of some."""
    for swap in run.glob(f".*{SWAP}"):
        target = run / swap.name.removeprefix(".").removesuffix(SWAP)
        if (swap / OLD).exists() and not target.exists():
            (swap / OLD).rename(target)
        shutil.rmtree(swap)
    for copy in (*run.glob(f".{MODEL}-*"), *run.glob(f".{BEST}-*")):
        shutil.rmtree(copy)
