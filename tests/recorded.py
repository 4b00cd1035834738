"""Recorded cases of official evaluation code: tests/golden/eval_*."""

from checkpoints import GOLDEN
from safetensors.torch import load_file
from torch import Tensor


def inputs(case: str) -> dict[str, Tensor]:
    """What the official code was given."""
    return load_file(GOLDEN / case / "inputs.safetensors")


def expected(case: str) -> dict[str, Tensor]:
    """What it gave."""
    return load_file(GOLDEN / case / "expected.safetensors")
