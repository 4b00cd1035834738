"""The tags of our weights, of which timm need not be asked."""

import timm

from vitreg_hub.arch import ARCHS
from vitreg_hub.tags import tags


def test_tags_are_those_that_timm_has():
    known = {arch: [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")] for arch in ARCHS}
    assert {arch: list(tags(arch)) for arch in ARCHS} == known
    assert tags("vit_large_reg4") == ("dinov2_lvd142m",)
