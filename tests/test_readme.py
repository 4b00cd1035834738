"""Every code block of the README, executed in order in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
SETUP = "pip install -e . && vitreg quickstart"
TESTS = 'pip install -e ".[test]" && pytest'

pytestmark = [pytest.mark.xdist_group("readme"), pytest.mark.timeout(900)]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_every_block_is_accounted_for():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert SHELL[:2] == [SETUP, TESTS]
    assert all(line.startswith("vitreg ") for line in SHELL[2:])
    ci = (ROOT / ".ci" / "run").read_text()  # runs what a test cannot: the installation, and the tests themselves
    assert '-e ".[test]"' in ci
    assert "\npytest" in ci


def test_quickstart_reaches_97_percent(folder):
    out = run([sys.executable, "-m", *SETUP.partition("&& ")[2].replace("vitreg", "vitreg_hub", 1).split()], folder)
    assert float(re.search(r"held-out accuracy (\S+)", out)[1]) >= 0.97
    assert out.count("largest difference 0\n") == 4
    for line in out.partition("next:\n")[2].splitlines()[:2]:  # what it says to type next works
        assert "reg_token" in run_shell(line, folder) or "VitRegModel" in run_shell(line, folder)


def run_shell(line: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", SHELL[2:])
def test_shell_line(line, folder):
    assert run_shell(line, folder)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block(code, folder):
    printed = run([sys.executable, "-c", code], folder)
    for shape in re.findall(r"# (\[[\d, ]+\])", code):
        assert f"torch.Size({shape})" in printed
