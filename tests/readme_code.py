"""The code blocks of the README, and a place to run them in as its reader does, one after the other."""

import os
import re
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer
from warm_python import WarmPython

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECTIONS = {
    title: [(language, code.replace("\\\n", "")) for language, code in BLOCK.findall(section)]
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
}
"""The blocks of every section, each with its language."""


def code_of(*sections: str) -> list[tuple[str, str]]:
    """What is to be run of some sections, in the order of the page: ("python", block) or ("bash", line)."""
    return [
        (language, part)
        for section in sections
        for language, code in SECTIONS[section]
        if language != "text"
        for part in (code.splitlines() if language == "bash" else [code])
    ]


def lines_for_larger_machines() -> list[str]:
    return [
        line for blocks in SECTIONS.values() for name, code in blocks if name == "text" for line in code.splitlines()
    ]


class Reader:
    """Runs code in a folder, where a Hub can be reached."""

    def __init__(self, folder: Path, hub: HubServer, warm: WarmPython) -> None:
        self.folder, self._warm = folder, warm
        self._environment = os.environ | hub.env("hf_reader_of_this")

    def run(self, language: str, code: str, *, cold: bool = False) -> str:
        """Standard output of code that must succeed, and show every shape that its comments tell.

        Its processes import the libraries themselves if it is to run as cold as at a reader's.
        """
        programs = Path(sys.executable).parent if cold else self._warm.folder
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["python", "-c", code] if language == "python" else code,
            shell=language == "bash",
            cwd=self.folder,
            env=self._environment | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if language == "python":
            for shape in re.findall(r"\[[\d, ]+\]", " ".join(re.findall(r"# (.*)", code))):
                assert f"torch.Size({shape})" in done.stdout
        return done.stdout
