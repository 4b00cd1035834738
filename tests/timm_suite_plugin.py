"""Pytest plugin that hands our architectures to timm's own model tests, in place of timm's (see test_timm_suite.py).

The upstream module reads its functions from `timm` when it is imported, thus after this plugin is configured.
"""

from typing import Any

import pytest
import timm
from torch import nn

import vitreg_hub  # noqa: F401  (registers the models)
from vitreg_hub.arch import get_arch

PATCHES = 8
"""Patches a side of the test images: the native ones of DINOv2 are above upstream's limits, where it skips a model."""

SHRUNK = dict(depth=4, embed_dim=96, num_heads=4)

_create_model, _list_models, _get_cfg_value = timm.create_model, timm.list_models, timm.get_pretrained_cfg_value


def image_side(name: str) -> int:
    """Side of the test images of an architecture, which may be named with a tag."""
    return PATCHES * get_arch(name.partition(".")[0]).patch_size


class Substitute:
    """What the upstream module sees as timm.

    Args:
        names: The architectures to test.
        overrides: Arguments of all their models.
    """

    def __init__(self, names: list[str], overrides: dict[str, Any]):
        self.names, self.overrides = names, overrides

    def create_model(self, name: str, **kwargs: Any) -> nn.Module:
        side = image_side(name)
        overlay = dict(input_size=(3, side, side))
        return _create_model(name, pretrained_cfg_overlay=overlay, **(self.overrides | dict(img_size=side) | kwargs))

    def get_pretrained_cfg_value(self, name: str, key: str) -> Any:
        return (3, image_side(name), image_side(name)) if key == "input_size" else _get_cfg_value(name, key)

    def list_models(self, *_: Any, include_tags: bool = False, name_matches_cfg: bool = False, **__: Any) -> list[str]:
        # Upstream's filters select by module and leave out sizes for their memory: neither applies to ours.
        return _list_models(self.names, include_tags=include_tags, name_matches_cfg=name_matches_cfg)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--archs", help="architectures to test, separated by commas")
    parser.addoption("--full-size", action="store_true", help="keep their widths and depths")


def pytest_configure(config: pytest.Config) -> None:
    overrides = {} if config.getoption("full_size") else SHRUNK
    substitute = Substitute(config.getoption("archs").split(","), overrides)
    for name in ("create_model", "get_pretrained_cfg_value", "list_models"):
        setattr(timm, name, getattr(substitute, name))
