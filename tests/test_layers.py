"""The shape of the package: which way imports point, and what is in the wheel."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
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
    {"errors", "import_hook"},
    {"arch"},
    {
        "timm_models",
        "hub_access",
        "vit_layout",
        "positions",
        "hf_attention",
        "residual_scale",
        "plain_doors",
        "environment",
        "licenses",
    },
    {"bundle_form", "tokens", "hub_download", "hub_commit"},
    {"bundle_rules"},
    {"bundle", "hub_tower", "hub_listing"},
    {"hf_models", "doors", "datasets", "info"},
    {"any_vit", "image_source", "auto_config"},
    {"analysis"},
    {"model_cards"},
    {"hub_shipment"},
    {"hub_target"},
    {"hub"},
    {"conversion", "training"},
    {"cli"},
    {"__main__"},
]


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) of every module of the project."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *parts)).removesuffix(".__init__"), path


def layer(module: str) -> int:
    part = module.removeprefix("vitreg_hub.").partition(".")[0]
    return next(i for i, names in enumerate(LAYERS) if part in names)


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vitreg_hub":
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "vitreg_hub" else []
            yield from names or [node.module]
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("vitreg_hub."))


@pytest.mark.parametrize(("module", "path"), [m for m in modules() if m[0] != "vitreg_hub"], ids=lambda v: str(v))
def test_imports_point_down(module, path):
    own = module.removeprefix("vitreg_hub.").partition(".")[0]
    for target in imports(path):
        part = target.removeprefix("vitreg_hub.").partition(".")[0]
        assert part == own or layer(target) < layer(module), f"{module} may not import {target}"


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
