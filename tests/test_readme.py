"""Every code block of the README, executed in order in one folder."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from hub_server import HubServer

from vitreg_hub.cli import main
from vitreg_hub.training.recipes.named import RECIPES

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where everything is run."""
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def run(folder) -> Iterator[Callable[[list[str] | str], str]]:
    """Standard output of a program, or of a line for the shell, that must succeed; with a Hub."""
    with HubServer({"hf_reader_of_this": "your-name"}) as hub:
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment = os.environ | path | hub.env("hf_reader_of_this")

        def run(command: list[str] | str) -> str:
            shell = isinstance(command, str)
            done = subprocess.run(
                command, shell=shell, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


@pytest.fixture(scope="module")
def printed(run) -> str:
    """What the README's first command printed."""
    return run(SETUP.partition("&& ")[2])


def test_every_block_is_accounted_for():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "text"}
    assert SHELL[:2] == [SETUP, TESTS]
    assert all(line.startswith("vitreg ") for line in SHELL[2:])
    ci = (ROOT / ".ci" / "run").read_text()  # runs what a test cannot: the installation, and the tests themselves
    assert '-e ".[test]"' in ci
    assert "\npytest" in ci


def test_quickstart_reaches_97_percent(printed):
    assert float(re.search(r"held-out accuracy (\S+)", printed)[1]) >= 0.97
    assert printed.count("largest difference 0\n") == 4


def test_what_the_quickstart_says_to_type_next_works(printed, run):
    timm_line, auto_line, push_line = printed.partition("next:\n")[2].splitlines()
    assert run(timm_line).startswith("VisionTransformer(")
    assert run(auto_line).startswith("VitRegModel(")
    assert push_line.split() == ["vitreg", "push", "quickstart/model", "your-name/vit_nano_reg4.digits"]


@pytest.mark.parametrize("line", SHELL[2:])
def test_shell_line(line, run, printed):
    assert run(line)


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
def test_python_block(code, run, printed):
    shown = run([sys.executable, "-c", code])
    for shape in re.findall(r"\[[\d, ]+\]", " ".join(re.findall(r"# (.*)", code))):
        assert f"torch.Size({shape})" in shown
