"""Which versions were tested: told without importing a library, and the same in the project, its metadata and CI."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vitreg_hub.cli import main
from vitreg_hub.tested import Library, libraries, tested_ranges, version_text

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARIES = (
    *("torch", "timm", "transformers", "huggingface_hub", "datasets", "accelerate", "open_clip_torch", "peft"),
)


def test_ranges_are_those_of_the_project():
    written = {r.name: r.specifier for r in map(Requirement, PROJECT["optional-dependencies"]["tested"])}
    assert tested_ranges() == written, "the installation is older than pyproject.toml: pip install -e ."
    assert tuple(written) == LIBRARIES


def test_ranges_start_where_the_requirements_do_or_later():
    ranges = tested_ranges()
    for line in map(Requirement, PROJECT["dependencies"]):
        assert all(s.operator == ">=" for s in line.specifier), f"{line}: upper bounds are the extra's"
        if line.name in ranges:
            lowest = next(s.version for s in ranges[line.name] if s.operator == ">=")
            assert line.specifier.contains(lowest)


@pytest.mark.parametrize(
    ("installed", "outside"),
    [
        *(("2.13.9", True), ("2.14.0", False), ("2.15.3+cpu", False), ("2.16.0", True)),
        *(("2.15.0.dev20261101", False), (None, False)),
    ],
)
def test_outside_is_below_or_above_the_range(installed, outside):
    assert Library(name="torch", installed=installed, tested=SpecifierSet(">=2.14,<2.16")).is_outside is outside


def test_short_text_is_our_version():
    assert version_text() == f"vitreg_hub {version('vitreg_hub')}"


def test_verbose_text_names_what_is_untested_and_what_is_missing():
    ranges = {"torch": ">=1,<2", "timm": ">=1,<9", "no-such-library": ">=3,<4"}
    lines = version_text(True, {name: SpecifierSet(text) for name, text in ranges.items()}).splitlines()
    assert lines[:2] == [version_text(), f"python {'.'.join(map(str, sys.version_info[:3]))}"]
    assert [line.split() for line in lines[2:]] == [
        ["library", "installed", "tested"],
        ["torch", version("torch"), ">=1,<2", "untested"],
        ["timm", version("timm"), ">=1,<9"],
        ["no-such-library", "not", "installed", ">=3,<4"],
    ]


@pytest.mark.parametrize("args", [["--version", "--verbose"], ["--verbose", "--version"]])
def test_command_prints_it(args, capsys):
    main(args)
    assert capsys.readouterr().out == version_text(verbose=True) + "\n"
    assert [line.split()[0] for line in version_text(verbose=True).splitlines()[3:]] == list(LIBRARIES)


@pytest.mark.parametrize(("module", "call"), [("tested", "version_text(True)"), ("environment", "now()")])
def test_no_library_is_imported(module, call):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("module", {str(ROOT / "vitreg_hub" / f"{module}.py")!r})
module = sys.modules["module"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.{call}
print(*({set(LIBRARIES) | {"open_clip", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_ci_tells_when_it_is_outside():
    ci = (ROOT / ".ci" / "run").read_text()
    told = ci[ci.index("versions=") : ci.index("ruff format")]
    for versions, outside in (
        (version_text(True), any(library.is_outside for library in libraries())),
        (version_text(True, {"torch": SpecifierSet(">=1,<2")}), True),
    ):
        script = f"set -euo pipefail\nvitreg() {{ cat <<'END'\n{versions}\nEND\n}}\n{told}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(versions)
        assert ("Outside of the tested versions" in done.stdout) is outside


def test_changes_and_citation_are_of_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changes, flags=re.MULTILINE)
    assert released[0] == PROJECT["version"]
    assert changes.index("## [Unreleased]") < changes.index(f"## [{released[0]}]")
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # those of Keep a Changelog
    assert set(re.findall(r"^### (.*)$", changes, flags=re.MULTILINE)) <= kinds
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["license"] == PROJECT["license"]
