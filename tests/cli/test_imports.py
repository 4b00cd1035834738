"""What answers at once: help, lists and mistakes import nothing that takes seconds."""

import json
import subprocess
import sys

import pytest

SLOW = ("torch", "timm", "transformers", "numpy", "huggingface_hub", "accelerate", "datasets")

PROGRAM = """
import json, sys
from vitreg_hub.cli import main

slow, *lines = json.loads(sys.argv[1])
for line in lines:
    try:
        main(line)
    except SystemExit:
        pass
    loaded = sorted(set(slow) & set(sys.modules))
    assert not loaded, f"vitreg {' '.join(line)} imports {', '.join(loaded)}"
"""

GROUPS = {
    "help": [["--help"], ["--version"], ["list"], ["list", "vit_*_reg4*"]],
    "usage": [[], ["trian"], ["--zzz"], ["list", "--zzz"], ["verify"], ["export", "a", "b"], ["list", "vit_hug"]],
    "commands": [
        [command, "--help"]
        for command in (
            *("quickstart", "list", "info", "verify", "convert", "export", "analyze", "attention", "push", "pull"),
            *("predict", "features"),
        )
    ],
    "train": [
        ["train"],
        ["train", "--help"],
        ["train", "dinov2_vitl14", "--help"],
        ["train", "dinov2_vitl14", "--print_config", "--optim.lr", "1e-3"],
        ["train", "supervised_digts"],
        ["train", "supervised_digits", "--optim.lr", "abc"],
        ["train", "supervised_digits"],
    ],
}


@pytest.mark.parametrize("group", GROUPS)
def test_answer_at_once(group):
    program = [sys.executable, "-c", PROGRAM, json.dumps([SLOW, *GROUPS[group]])]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
