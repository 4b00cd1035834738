"""timm's own model tests, unmodified, on our architectures.

The models are shrunk (tests/timm_suite_plugin.py), and two keep their width and depth as well. Upstream's check of
registers in the optimizer (tests/test_optim.py, test_param_groups_layer_decay_reg_token_stem) builds its
VisionTransformer itself: its equivalent for our rows stands at the end of this file.
"""

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import upstream
from timm.models import VisionTransformer, group_parameters
from timm.optim import param_groups_layer_decay

from vitreg_hub.arch import ARCHS
from vitreg_hub.tested import libraries

SLOWEST = "test_prune_intermediate_layers_contract"  # copies the model three times per block
RUN = [
    SLOWEST,  # first, so that no worker waits for it
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
]

# All other functions of the file name the models or layers of timm that they are about.
LEFT_OUT = {
    "test_model_inference": "downloads the weights of timm's test_* models",
    "test_model_load_pretrained": "downloads all weights",
    "test_model_features_pretrained": "downloads all weights; excludes vit_* (NON_STD_FILTERS)",
    "test_model_default_cfgs": "excludes vit_*, which have test_model_default_cfgs_non_std",
    "test_model_forward_features": "excludes vit_*, which have test_model_forward_intermediates_features",
    "test_model_features_space2depth_reduction": "about efficientnet_h and efficientnet_x",
}

EVERY_SIZE = [
    name for name, spec in ARCHS.items() if spec.num_registers == 4 or spec.size == "nano" or spec.lineage.distilled
]
THE_REST = [name for name in ARCHS if name not in EVERY_SIZE]


def upstream_tests() -> Path:
    return upstream.source("timm") / "tests" / "test_models.py"


def still_there(functions: list[str]) -> list[str]:
    """Those of the functions that upstream has not taken away (see test_what_upstream_added_or_took_away_is_told)."""
    defined = upstream_tests().read_text()
    found = [function for function in functions if f"def {function}(" in defined]
    assert found, "upstream has none of these tests any more"
    return found


def run_suite(archs: list[str], functions: list[str], report: Path, *options: str) -> dict[str, list[str]]:
    """Run upstream's `functions` on `archs`. Returns the models that passed each; any other outcome fails."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    for name in ("GITHUB_ACTIONS", "TORCH_BACKEND", "TORCH_DEVICE", "PYTEST_ADDOPTS"):  # they change what is run
        environment.pop(name, None)
    path = upstream_tests()
    pytest_command = [sys.executable, "-m", "pytest", "-p", "timm_suite_plugin", "-p", "no:cacheprovider", "-n", "2"]
    # importlib: the default import mode puts upstream's source in front of the installed timm.
    place = ["-c", path.parents[1] / "pyproject.toml", "--import-mode=importlib", f"--junitxml={report}"]
    selected = [f"{path}::{function}" for function in functions]
    done = subprocess.run(
        [*pytest_command, *place, f"--archs={','.join(archs)}", *options, *selected],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-10_000:]

    passed: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        assert case.find("skipped") is None, ElementTree.tostring(case, "unicode")
        function, model = re.fullmatch(r"(\w+)\[(?:\d-)?(.+)\]", case.attrib["name"]).groups()  # 1-: the batch size
        passed.setdefault(function, []).append(model)
    return {function: sorted(models) for function, models in passed.items()}


def expected(archs: list[str], functions: list[str]) -> dict[str, list[str]]:
    """Upstream checks the cfg of every tag, anything else once per architecture."""
    with_tags = timm.list_models(archs, include_tags=True)
    assert {name.partition(".")[0] for name in with_tags} == set(archs)
    return {f: sorted(with_tags if f == "test_model_default_cfgs_non_std" else archs) for f in functions}


@pytest.mark.parametrize(
    "archs", [pytest.param(EVERY_SIZE, id="every-size"), pytest.param(THE_REST, id="rest", marks=pytest.mark.slow)]
)
def test_shrunk(archs: list[str], tmp_path: Path):
    functions = still_there(RUN)
    assert run_suite(archs, functions, tmp_path / "report.xml") == expected(archs, functions)


@pytest.mark.parametrize(
    "functions",
    [
        pytest.param(RUN[1:], id="most", marks=pytest.mark.slow),
        pytest.param([SLOWEST], id="slowest", marks=pytest.mark.slow),
    ],
)
def test_full_size(functions: list[str], tmp_path: Path):
    archs, functions = ["vit_small_reg4", "vit_base_reg4_deit3"], still_there(functions)
    assert run_suite(archs, functions, tmp_path / "report.xml", "--full-size") == expected(archs, functions)


def over_models(source: str) -> set[str]:
    """Test functions of a file that are run on lists of models."""
    nodes = ast.walk(ast.parse(source))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    decorators = {f.name: " ".join(map(ast.unparse, f.decorator_list)) for f in functions}
    return {name for name, text in decorators.items() if re.search(r"list_(models|pretrained)\(", text)}


def news(source: str) -> list[str]:
    """How a file of upstream's differs from what is known of it here."""
    found, known = over_models(source), {*RUN, *LEFT_OUT}
    added = [f"{name} is new: add it to RUN or LEFT_OUT" for name in sorted(found - known)]
    return added + [f"{name} is gone" for name in sorted(known - found)]


def test_what_upstream_added_or_took_away_is_told():
    for what in news(upstream_tests().read_text()):
        warnings.warn(f"timm {timm.__version__}: {what}", stacklevel=1)


def test_additions_and_losses_are_seen():
    source = upstream_tests().read_text()
    inside_its_range = "timm" not in {library.name for library in libraries() if library.is_outside}
    assert not (news(source) and inside_its_range)
    added = "\n@pytest.mark.parametrize('model_name', list_models('vit_*'))\ndef test_model_of_tomorrow(): ..."
    assert "test_model_of_tomorrow is new: add it to RUN or LEFT_OUT" in news(source + added)
    assert "test_model_forward_fx is gone" in news(source.replace("def test_model_forward_fx(", "def test_other("))


def optimizer_groups(model: VisionTransformer) -> dict[str, tuple[int, float, float]]:
    """Layer, scale of the learning rate and weight decay of every parameter."""
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75)
    facts = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: (layers[name], *facts[id(p)]) for name, p in model.named_parameters()}


def test_optimizer_groups_are_those_of_timms_model():
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", device="meta", num_classes=10)
    ours = timm.create_model("vit_small_reg4", device="meta", num_classes=10)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert optimizer_groups(ours) == optimizer_groups(theirs)


@pytest.mark.parametrize("name", [name for name, spec in ARCHS.items() if spec.num_registers == 4])
def test_registers_train_with_the_stem_and_without_decay(name: str):
    model = timm.create_model(name, device="meta", depth=2)
    assert "reg_token" in model.no_weight_decay()
    groups = optimizer_groups(model)
    assert groups["reg_token"] == groups["cls_token"] == groups["pos_embed"]
    layer, lr_scale, weight_decay = groups["reg_token"]
    assert layer == min(layer for layer, _, _ in groups.values())
    assert lr_scale == min(scale for _, scale, _ in groups.values()) < 1
    assert weight_decay == 0
