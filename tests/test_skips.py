"""A class decides what the skips of its tests mean, however they come about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import unittest, warnings
import pytest

class Judged(unittest.TestCase):
    @classmethod
    def judge_skip(cls, name, reason):
        if "allowed" in name:
            return warnings.warn(f"{cls.__name__}.{name} was skipped: {reason}")
        return f"{name} must run: {reason}"

    def test_that_runs(self): pass
    @unittest.skip("allowed reason")
    def test_allowed(self): pass
    @unittest.skip("reason 1")
    def test_decorator(self): pass
    @pytest.mark.skip(reason="reason 2")
    def test_mark(self): pass
    @pytest.mark.skipif(True, reason="reason 3")
    def test_condition(self): pass
    def test_unittest(self): self.skipTest("reason 4")
    def test_pytest(self): pytest.skip("reason 5")
    def test_part(self):
        with self.subTest("part"): self.skipTest("reason 6")
    @pytest.mark.xfail
    def test_expected(self): assert False

class Other(unittest.TestCase):
    @unittest.skip("nobody minds")
    def test_other(self): pass
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """What pytest tells of the suite above."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_suite.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-rA", str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).with_name("skips.py").parent)},
        capture_output=True,
        text=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *(("decorator", "reason 1"), ("mark", "reason 2"), ("condition", "reason 3"), ("unittest", "reason 4")),
        *(("pytest", "reason 5"), ("part", "reason 6"), ("expected", "expected to fail")),
    ],
)
def test_skip_that_is_a_failure(told, name, reason):
    assert re.search(rf"^(FAILED|ERROR|SUBFAILED\[part\]) test_suite\.py::Judged::test_{name}\b", told, re.MULTILINE)
    assert f"test_{name} must run: {reason}" in told


def test_skip_that_is_allowed_is_one_and_what_its_judge_says_is_seen(told):
    assert "PASSED test_suite.py::Judged::test_that_runs" in told
    assert "FAILED test_suite.py::Judged::test_allowed" not in told
    assert "UserWarning: Judged.test_allowed was skipped: allowed reason" in told


def test_class_without_a_judge_skips_as_ever(told):
    assert "nobody minds" in told
    assert "FAILED test_suite.py::Other" not in told
