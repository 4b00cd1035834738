"""The shape of the package: which way imports point, and what is in the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "vitreg_hub": "vitreg_hub",
    "vitreg_hub.conversion": "conversion",
    "vitreg_hub.model_cards": "model_cards",
    "vitreg_hub.training": "training",
}
LAYERS = [
    {"errors", "import_hook", "objectives"},
    {"bounded"},
    {"arch", "compat", "console", "environment", "licenses", "plotting", "tags", "tested", "typed"},
    {"network", "pages"},
    {"timm_models", "files", "names"},
    {"remote", "tokens"},
    {"bundle"},
    {"hf_config", "images"},
    {"hf_models"},
    {"any_vit", "auto_config"},
    {"passes"},
    {"analysis", "evaluation"},
    {"model_cards"},
    {"hub"},
    {"conversion", "training"},
    {"cli"},
    {"__main__"},
]
"""Rooms from the lowest floor to the highest. Those on one floor know nothing of each other."""


def modules() -> dict[str, Path]:
    """The file of every module of the project by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The first part of its name, and for what `python -m` runs the last."""
    name = module.removeprefix("vitreg_hub.")
    return name.rpartition(".")[2] if name.endswith("__main__") else name.partition(".")[0]


def layer(module: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room(module) in rooms)


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vitreg_hub":
            named = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in named.values()}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("vitreg_hub.")}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", [name for name in MODULES if name != "vitreg_hub"])
def test_imports_point_down(module):
    for target in imports(MODULES[module]) - {"vitreg_hub"}:
        assert room(target) == room(module) or layer(target) < layer(module), f"{module} may not import {target}"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def test_no_module_has_the_name_of_one_in_the_standard_library():
    named = {path for path in MODULES.values() if path.stem in sys.stdlib_module_names - {"__main__"}}
    assert not named


def test_wheel_holds_every_file_of_the_checkout(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES.values()],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert len(listed) > 20
    wanted = {re.sub(r"^(conversion|model_cards|training)/", r"vitreg_hub/\1/", file) for file in listed}
    assert wanted <= inside, f"not in the wheel: {sorted(wanted - inside)}"


@pytest.mark.parametrize("name", ["conversion", "model_cards", "training"])
def test_bare_names_are_refused(name):
    run = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert f"import vitreg_hub.{name} instead" in run.stderr


def test_requirements_are_installed_at_or_above_their_bounds():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name)), line
