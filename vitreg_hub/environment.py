"""Where and by what something is made: what provenance and model cards tell of it."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
PROGRAMS = {"vitreg": "vitreg", "vitreg_hub": "vitreg", "training": "python -m vitreg_hub.training"}
"""Ways to start this package, by the name of the script or of the folder of its `__main__.py`."""


def now() -> str:
    """Time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(*libraries: str) -> dict[str, str]:
    """Versions of Python, this package and more libraries."""
    found = {name: version(name) for name in ("vitreg_hub", "torch", "timm", *libraries)}
    return {"python": platform.python_version(), **found}


def command(argv: Sequence[str] | None = None) -> str | None:
    """The command line that runs, None where this package is called from a program of someone else.

    Of paths only the last part is kept: the folders of a machine are nobody's business.

    Args:
        argv: `sys.argv` by default.
    """
    program, *args = sys.argv if argv is None else argv
    path = Path(program)
    name = path.parent.name if path.name == "__main__.py" else path.stem
    if name not in PROGRAMS:
        return None
    return f"{PROGRAMS[name]} {shlex.join(map(_without_folders, args))}".rstrip()


def _without_folders(arg: str) -> str:
    """An argument, or an option with a value after "=", without the folders of an absolute path or a home."""
    option, equals, value = arg.rpartition("=")
    return f"{option}{equals}{os.path.basename(value.rstrip('/'))}" if value.startswith(("/", "~")) else arg


def commit() -> str | None:
    """The commit of this package's source, with `-dirty` if it was changed since; None if it is no checkout."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's checkout
        return None


def hardware(device: torch.device | None = None, *, num_processes: int = 1) -> str:
    """What computes, in words.

    Args:
        device: Of this process; the CPU by default.
        num_processes: Processes with a device like this one.
    """
    if device is not None and device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    words = f"{_cpu()}, {threads} thread{'s' * (threads > 1)}"
    return words if num_processes == 1 else f"{words} in each of {num_processes} processes"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
