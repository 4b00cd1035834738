"""What the README says that is not run."""

import re

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from readme_code import ROOT, SECTIONS, TEXT, code_of, lines_for_larger_machines

from vitreg_hub.cli import main
from vitreg_hub.training.recipes.named import RECIPES

RUN = {
    "test_quickstart": ("Install and run", "Use with timm", "Use with transformers", "Bundles", "Publish"),
    "test_own_images": ("Your own images",),
    "test_convert": ("Convert",),
    "test_train": ("Train",),
    "test_analyze": ("Analyze",),
    "test_evaluate": ("Evaluate",),
    "test_pictures": ("Predictions and features",),
}
"""Which test beside this one runs which sections."""


def test_every_block_is_accounted_for():
    assert {language for blocks in SECTIONS.values() for language, _ in blocks} == {"bash", "python", "text"}
    assert TEXT.count("\n```") == 2 * sum(len(blocks) for blocks in SECTIONS.values())
    assert {title for title, blocks in SECTIONS.items() if blocks} == {title for run in RUN.values() for title in run}
    for test, sections in RUN.items():
        assert ", ".join(f'"{section}"' for section in sections) in (ROOT / "tests/readme" / f"{test}.py").read_text()


def test_what_installs_and_tests_is_what_ci_runs():
    assert code_of("Install and run")[0] == ("bash", "pip install -e . && vitreg quickstart")
    assert code_of("Install and run")[1:] == [("bash", 'pip install -e ".[test]" && pytest')]
    ci = (ROOT / ".ci" / "run").read_text()  # runs what a test cannot: the installation, and the tests themselves
    assert '-e ".[test]"' in ci
    assert "\npytest" in ci


@pytest.mark.parametrize("line", lines_for_larger_machines())
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
