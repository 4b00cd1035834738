"""transformers' own common tests as importable modules.

They lie in its source distribution as parts of a package named `tests`, as our folder is, and import a few modules that
are left out there. Here they get a package name of their own, and stand-ins for what is missing.
"""

import importlib
import sys
import unittest.mock
import warnings
from types import ModuleType

import numpy as np
import pytest
import transformers
import upstream
from PIL import Image

from vitreg_hub.tested import libraries

PACKAGE = "transformers_tests"

COMMON_SETTINGS = dict(
    return_dict=False,
    output_hidden_states=True,
    output_attentions=True,
    dtype="float16",
    chunk_size_feed_forward=5,
    architectures=["SomeModel"],
    id2label={0: "label"},
    label2id={"label": "0"},
    problem_type="regression",
)
"""For each setting that every configuration of transformers has, a value that is not its default."""


def photograph(url: str) -> Image.Image:
    """What the tests of image processors get instead of a download."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


STAND_INS = {
    f"{PACKAGE}.exporters": {},
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation": {},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils": {},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": COMMON_SETTINGS},
    "fetch_hub_objects_for_ci": {"url_to_local_path": photograph},
}


def _add_module(name: str, **members: object) -> None:
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(members)


def load(*names: str) -> list[ModuleType]:
    """Import modules of transformers' test suite, e.g. ``test_modeling_common``."""
    if PACKAGE not in sys.modules:
        for name, members in STAND_INS.items():
            _add_module(name, **members)
        _add_module(PACKAGE, __path__=[str(upstream.source("transformers") / "tests")])
    # one of them imports transformers a second time, from a checkout that is not there
    with unittest.mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return [_module(name) for name in names]


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        if "transformers" not in {library.name for library in libraries() if library.is_outside}:
            raise
        reason = f"the tests of transformers {transformers.__version__}, which is untested here, need {error.name}"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason, allow_module_level=True)
