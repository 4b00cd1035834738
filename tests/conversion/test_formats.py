"""The records of the formats: what they load, and what others know of them."""

import subprocess
import sys
from pathlib import Path

from vitreg_hub.conversion.formats.detect import FORMATS
from vitreg_hub.model_cards.facts import CLIP_FORMATS

LIST_THEM = """
import sys, types
for name, path in {"vitreg_hub": "vitreg_hub", "vitreg_hub.conversion": "conversion"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from vitreg_hub.conversion.formats.detect import EXPORTS, FORMATS
print(*sorted({"torch", "timm", "transformers", "open_clip"} & sys.modules.keys()))
print(*FORMATS)
"""
"""With empty packages, for these may load anything."""


def test_formats_are_listed_without_the_libraries():
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", LIST_THEM], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    loaded, listed = run.stdout.splitlines()
    assert loaded == ""
    assert listed.split() == list(FORMATS)


def test_cards_know_which_heads_are_projections():
    assert {name for name, fmt in FORMATS.items() if fmt.head_is_projection} == set(CLIP_FORMATS)
