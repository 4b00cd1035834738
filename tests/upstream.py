"""The test suites of timm and transformers: not installed with them, but part of their source distributions."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent / ".upstream"


def source(project: str) -> Path:
    """Unpacked source distribution of the installed version of `project`, fetched once with pip."""
    release = f"{project}-{version(project)}"
    target = CACHE / release
    if target.is_dir():
        return target
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as staging:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--dest", staging]
        subprocess.run([*pip, f"{project}=={version(project)}"], check=True)
        with tarfile.open(next(Path(staging).glob("*.tar.gz"))) as archive:
            archive.extractall(staging, filter="data")
        if not target.is_dir():  # another process may have been faster
            (Path(staging) / release).rename(target)
    return target
