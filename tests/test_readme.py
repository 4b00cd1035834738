"""Every code block of the README, executed in order in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from vitreg_hub.cli import main
from vitreg_hub.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = [
    (language, code.replace("\\\n", ""))
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
]
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
LARGE = [line for language, code in BLOCKS if language == "text" for line in code.splitlines()]
SETUP = "pip install -e . && vitreg quickstart"
TESTS = 'pip install -e ".[test]" && pytest'

pytestmark = pytest.mark.timeout(900)


def run(command: list[str] | str, folder: Path) -> str:
    """Standard output of a program, or of a line for the shell, that must succeed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shell = isinstance(command, str)
    done = subprocess.run(
        command, shell=shell, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the README's first command was run; what it printed is in printed.txt."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "printed.txt").write_text(run(SETUP.partition("&& ")[2], folder))
    return folder


def test_every_block_is_accounted_for():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "text"}
    assert SHELL[:2] == [SETUP, TESTS]
    assert all(line.startswith("vitreg ") for line in SHELL[2:])
    ci = (ROOT / ".ci" / "run").read_text()  # runs what a test cannot: the installation, and the tests themselves
    assert '-e ".[test]"' in ci
    assert "\npytest" in ci


def test_quickstart_reaches_97_percent(folder):
    printed = (folder / "printed.txt").read_text()
    assert float(re.search(r"held-out accuracy (\S+)", printed)[1]) >= 0.97
    assert printed.count("largest difference 0\n") == 4


def test_what_the_quickstart_says_to_type_next_works(folder):
    timm_line, auto_line, push_line = (folder / "printed.txt").read_text().partition("next:\n")[2].splitlines()
    assert run(timm_line, folder).startswith("VisionTransformer(")
    assert run(auto_line, folder).startswith("VitRegModel(")
    assert push_line.split() == ["vitreg", "push", "quickstart/model", "your-name/vit_nano_reg4.digits"]


@pytest.mark.parametrize("line", SHELL[2:])
def test_shell_line(line, folder):
    assert run(line, folder)


@pytest.mark.parametrize("line", LARGE)
def test_line_that_needs_more_than_this_machine_is_understood(line, capsys):
    program, *args = line.split()
    if program == "accelerate":
        launch = launch_command_parser().parse_args(args[1:])
        assert launch.multi_gpu
        assert launch.module
        assert launch.training_script == "vitreg_hub.training"
        assert launch.num_processes == 8 * (launch.num_machines or 1)
        args = ["train", *launch.training_script_args]
    main([*args, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["name"] == args[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_in_the_table(recipe):
    assert re.search(rf"^\|.*`{recipe}`.*\|", TEXT, re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block(code, folder):
    printed = run([sys.executable, "-c", code], folder)
    for shape in re.findall(r"\[[\d, ]+\]", " ".join(re.findall(r"# (.*)", code))):
        assert f"torch.Size({shape})" in printed
