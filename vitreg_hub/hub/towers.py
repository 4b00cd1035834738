"""The repository of both towers of a CLIP model, beside its bundle's, which open_clip can load."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from safetensors import SafetensorError, safe_open

from vitreg_hub import licenses
from vitreg_hub.bounded import read_json, read_small
from vitreg_hub.errors import BundleError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, TOWER_SUFFIX
from vitreg_hub.names import HUB_PREFIX
from vitreg_hub.network.kinds import is_registers
from vitreg_hub.remote.commit import Files

LOCAL_PREFIX = "local-dir:"
"""How timm and open_clip name a model in a folder."""

CARD = """\
---
{metadata}
---
<!-- vitreg:towers -->
# {name}

Both towers of a contrastive model in [open_clip](https://github.com/mlfoundations/open_clip)'s own form. Its image
tower alone, for timm and transformers, and all that is known about it is [{bundle}]({page}).

- **License:** {license}

```python
{code}
```
<!-- /vitreg:towers -->
"""
CODE = """\
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("hf-hub:{repo}")
tokenizer = open_clip.get_tokenizer("hf-hub:{repo}")"""
CODE_OF_BRANCH = """\
import open_clip
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo}", revision="{branch}")
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{{folder}}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{{folder}}")"""
"""open_clip itself loads only main."""
TOWERS_BLOCK = "towers"
"""Name of the card's block."""


def tower_files(folder: Path, *, bundle_repo: str, branch: str, license: str | None) -> Files:
    """What the towers' repository is to hold, beside ``org/name`` of the bundle and on a branch of the same name.

    Where the configuration names the image tower by a local folder, it names this repository instead, which then also
    holds the config.json that timm reads.

    Raises:
        BundleError: Files are missing or broken.
    """
    if not (folder / OPENCLIP_WEIGHTS).is_file():
        raise BundleError(f"{folder} has no {OPENCLIP_WEIGHTS}: delete the folder, or write it again.")
    config = _read(folder)
    repo = bundle_repo + TOWER_SUFFIX
    files: dict[str, Path | bytes] = {OPENCLIP_WEIGHTS: folder / OPENCLIP_WEIGHTS}
    if (folder / CONFIG_FILE).is_file():
        files[CONFIG_FILE] = folder / CONFIG_FILE
    vision = config["model_cfg"].get("vision_cfg", {})
    if str(vision.get("timm_model_name", "")).startswith(LOCAL_PREFIX):
        if CONFIG_FILE not in files:
            raise BundleError(f"{folder} has no {CONFIG_FILE}, from which timm builds the image tower: write it again.")
        vision["timm_model_name"] = f"{HUB_PREFIX}{repo}" + ("" if branch == "main" else f"@{branch}")
    files[OPENCLIP_CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    registers = _has_registers(folder / OPENCLIP_WEIGHTS)
    files[CARD_FILE] = _card(repo, bundle_repo, license, branch=branch, registers=registers).encode()
    return files


def _read(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(read_small(folder / OPENCLIP_CONFIG))
    except ValueError as error:
        raise BundleError(f"{folder}/{OPENCLIP_CONFIG} is not JSON ({error}): write it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise BundleError(f"{folder}/{OPENCLIP_CONFIG} has no 'model_cfg', as open_clip wants it: write it again.")
    return config


def _has_registers(weights: Path) -> bool:
    try:
        with safe_open(weights, "pt") as file:
            return any(is_registers(name) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{weights} cannot be read ({error}): write it again.") from error


def _card(repo: str, bundle_repo: str, license: str | None, *, branch: str, registers: bool) -> str:
    metadata = hf.ModelCardData(
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        tags=["open_clip", "clip", *(["registers"] if registers else [])],
        **licenses.metadata(license),
    )
    main = branch == "main"
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=repo.rpartition("/")[2],
        bundle=bundle_repo,
        page=f"https://huggingface.co/{bundle_repo}" + ("" if main else f"/tree/{branch}"),
        code=(CODE if main else CODE_OF_BRANCH).format(repo=repo, branch=branch),
        license=license or "unknown",
    )
