"""Where, when and by which command something was made, for provenance and model cards."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from vitreg_hub.errors import printable

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).parent
SCRIPTS = ("vitreg", "vitreg.exe")
MODULES = {
    PACKAGE: "vitreg",
    PACKAGE / "training": "python -m vitreg_hub.training",
    PACKAGE.parent / "training": "python -m vitreg_hub.training",  # in a checkout
}
"""Programs of this package, by the folder of their `__main__.py`."""

BETWEEN = re.compile(r"""((?:[=,;:"'`()\[\]{}|@&<>]+\s*|\s+(?=[/~\\]|\.\.[/\\]))+)""")
"""What separates an option from its value, and values and paths from each other: a path may hold spaces."""
NAMES = r"(?:token|password|passwd|pwd|secret|credentials?|auth|(?:api|access|wandb|private)[-_]?key)"
OPTION = rf"(?<![\w-])--?(?:[\w.-]*[._-])?(?:{NAMES}|key)"
SECRET_BEFORE = re.compile(rf"(?:{OPTION}|\bBearer)$", re.IGNORECASE)
SECRET = re.compile(rf"((?:{OPTION}(?:=|\s+)|\b(?:\w+_)?{NAMES}=|\bBearer\s+))\S+", re.IGNORECASE)
"""What follows the name of a secret, as the next argument or in a text."""
TOKEN = re.compile(r"hf_\w+")
LONG_TOKEN = re.compile(
    r"hf_\w{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{12,}"
    r"|AIza[\w-]{20,}|xox[a-z]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*"
)
"""An access token of the Hub as a value, and those of the Hub and other services anywhere."""
DRIVE = re.compile(r"(?<!\w)[A-Za-z]:(?=\\|/(?!/))")
"""The beginning of a path on Windows."""
QUERY = re.compile(r"(://[^?#]*)[?#].*", re.DOTALL)
"""The end of a URL, which may hold signatures and keys."""
URL = re.compile(r"""((?!file:)\b[a-z][a-z0-9+.-]*://(?:(?!::)[^\s'"\[\](),|<>])*)""", re.IGNORECASE)
PIPE = re.compile(r"(pipe:).*", re.DOTALL)
"""A shell command, any part of which may be secret."""
HIDDEN = "***"


def now() -> str:
    """Time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(*libraries: str) -> dict[str, str]:
    """Versions of Python, this package and more libraries."""
    found = {name: version(name) for name in ("vitreg_hub", "torch", "timm", *libraries)}
    return {"python": platform.python_version(), **found}


def made_with(*libraries: str, device: "torch.device | None" = None, num_processes: int = 1) -> dict[str, Any]:
    """Fields of a `Provenance`, with the versions of these `libraries`; the others as of `hardware`."""
    shown = hardware(device, num_processes=num_processes)
    return {"versions": versions(*libraries), "command": command(), "commit": commit(), "hardware": shown}


def command(argv: Sequence[str] | None = None) -> str | None:
    """The command line that runs; None if someone else's program calls this package.

    It is made public: paths outside the current folder are cut to their last part, and secrets are hidden.
    """
    program, *args = sys.argv if argv is None else argv
    path = Path(program)
    name = "vitreg" if path.name in SCRIPTS else None
    if path.name == "__main__.py":
        name = MODULES.get(path.parent)
    if name is None:
        return None
    shown = (_shown(arg, before=before) for before, arg in zip([program, *args], args, strict=False))
    return f"{name} {shlex.join(shown)}".rstrip()


def _shown(arg: str, *, before: str) -> str:
    """An argument as others may see it, given the one before it."""
    option, equals, _ = arg.partition("=")
    if equals and SECRET_BEFORE.search(option):
        return f"{option}={HIDDEN}"
    if SECRET_BEFORE.search(before):
        return HIDDEN
    return public_text(arg)


def public_text(text: str) -> str:
    """A text as others may see it: paths outside the current folder are cut to their last part, secrets are hidden."""
    shown = PIPE.sub(rf"\1{HIDDEN}", QUERY.sub(rf"\1?{HIDDEN}", text))
    shown = DRIVE.sub("", LONG_TOKEN.sub(HIDDEN, SECRET.sub(rf"\1{HIDDEN}", shown)))
    texts = [_shown_url(part) if URL.fullmatch(part) else _shown_paths(part) for part in URL.split(shown)]
    return printable("".join(texts))


def _shown_url(url: str) -> str:
    return re.sub(r"://[^/@]*@", f"://{HIDDEN}@", url)


def _shown_paths(text: str) -> str:
    shown = ""
    for before, part in pairwise(["", *BETWEEN.split(text)]):
        if TOKEN.fullmatch(part):
            shown += HIDDEN
        elif before.endswith("}") and part.startswith("/"):  # continues a path: {a,b}/c
            shown += part if text.startswith(shown) else f"/{os.path.basename(part.rstrip('/'))}"
        else:
            shown += without_folders(part)
    return shown


def without_folders(name: str) -> str:
    """A name as it is, or the last part of a path that leaves the current folder: a machine's folders stay private."""
    if re.match(r"\\|[A-Za-z]:[\\/]|~?\w*\\|\.\.\\", name):  # Windows'
        name = PureWindowsPath(name).as_posix()
    if re.match(r"/|~|[A-Za-z]:/", name) or os.path.normpath(name).startswith(".."):
        return os.path.basename(name.rstrip("/")) or name
    return name


def duration(seconds: float) -> str:
    """A time in words: seconds up to two minutes, minutes up to two hours, then hours."""
    if seconds < 120:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def commit(root: Path = PACKAGE.parent) -> str | None:
    """The commit of this package's source, with `-dirty` if it was changed since; None if `root` is no checkout."""
    if not (root / ".git").exists() or not (root / "training").exists():  # in a wheel, training/ is inside the package
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or another user's checkout
        return None


def hardware(device: "torch.device | None" = None, *, num_processes: int = 1) -> str:
    """The hardware, in words.

    Args:
        device: Of this process; the CPU by default.
        num_processes: Processes with a device like this one.
    """
    import torch  # takes seconds, and the rest of this module does not need it

    if device is not None and device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    words = f"{_cpu()}, {threads} thread{'' if threads == 1 else 's'}"
    return words if num_processes == 1 else f"{words} in each of {num_processes} processes"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
