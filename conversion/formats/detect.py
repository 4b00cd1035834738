"""All formats, how they are recognised, and the look-alikes that are refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitreg_hub.conversion.checkpoint.sets import vit_prefixes
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.clip import HF_CLIP, OPENAI, OPENCLIP, OPENCLIP_TIMM
from vitreg_hub.conversion.formats.dinov2 import DINO, DINOV2
from vitreg_hub.conversion.formats.hugging_face import HF_DEIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_VIT, PH_REG
from vitreg_hub.conversion.formats.timm_format import DEIT, DEIT3, TIMM, has_plain_names
from vitreg_hub.errors import ConversionError

if TYPE_CHECKING:
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

FORMATS: dict[str, CheckpointFormat] = {
    fmt.name: fmt
    for fmt in (
        # the signs of an earlier one may contain those of a later one
        OPENCLIP_TIMM,
        OPENCLIP,
        OPENAI,
        HF_CLIP,
        PH_REG,
        HF_DINOV2_REGISTERS,
        HF_DINOV2,
        HF_DEIT,
        HF_VIT,
        DINO,
        DEIT3,
        DEIT,
        DINOV2,
        TIMM,
    )
}
EXPORTS = tuple(sorted(name for name, fmt in FORMATS.items() if fmt.is_exported))

DINOV3 = (
    "is DINOv3, whose rotary positions timm's VisionTransformer does not have; timm hosts it as Eva "
    "(timm.list_models('*dinov3*'))"
)

REFUSED = {
    r"(^|\.)flat_param$|_flat_param": "is a part of a sharded FSDP run: merge the ranks into one state dict first",
    r"storage_tokens|rope_embed\.periods": DINOV3,
    r"(^|\.)rope\.|freqs_cis": "has rotary positions, which timm's VisionTransformer does not have",
    r"(^|\.)decoder_(embed|blocks|pos_embed|pred|norm)|^decoder\.": (
        "is a masked autoencoder with its decoder: keep the encoder's tensors alone"
    ),
    r"relative_position_(bias_table|index)|rel_pos_bias|attn\.[qv]_bias": (
        "has BEiT's relative positions or split biases, which timm's VisionTransformer does not have"
    ),
    r"blocks\.\d+\.(norm11|norm1\d|attn1|mlp1|gamma_\d_\d)\b": (
        "has DeiT-III's parallel blocks (_paralx2), which timm's VisionTransformer does not have"
    ),
    r"patch_embed\.proj\.\d+\.": "has a convolutional (hMLP) stem, which timm's VisionTransformer does not have",
    r"attn_pool|text_decoder": "pools with attention (CoCa, SigLIP), which these architectures do not have",
    r"^(visual\.)?layer1\.0\.conv1": "is a ResNet",
    r"\.(q_norm|k_norm)\.|ln_[qk]\.|\.head_scale": "has norms or scales inside attention, which no row has",
}
"""Patterns of names that only other networks have, and what these networks are."""


def find_format(name: str) -> CheckpointFormat:
    """Look up a format.

    Raises:
        ConversionError: No format has that name.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        closest = f"closest: {near[0]}; " if near else ""
        raise ConversionError(f"no format {name!r}; {closest}there are {', '.join(FORMATS)}, and auto.")
    return FORMATS[name]


def refuse_look_alikes(checkpoint: Checkpoint) -> None:
    """Raise a ConversionError, with the reason, for networks that are not plain ViTs."""
    names = checkpoint.infos
    for pattern, reason in REFUSED.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise ConversionError(f"{checkpoint.called} {reason} (it holds {found}).")
    has_registers = any(name.rpartition("model.")[2] == "embeddings.register_tokens" for name in names)
    if has_registers and not any(name.endswith("embeddings.position_embeddings") for name in names):
        raise ConversionError(f"{checkpoint.called} {DINOV3}.")
    masks = [info.shape for name, info in names.items() if name.rpartition(".")[2] == "mask_token"]
    if any(len(shape) == 3 for shape in masks) and not any("embeddings." in name for name in names):
        raise ConversionError(
            f"{checkpoint.called} is a masked autoencoder or BEiT (its mask_token has three dimensions), "
            "not one of the lineages that are converted."
        )


def detect(checkpoint: Checkpoint) -> CheckpointFormat:
    """Recognise the format of a checkpoint by its container and config, by its names, or by what stands around them.

    Raises:
        ConversionError: No format, or several that normalise images or resample positions differently.
    """
    names = checkpoint.infos
    declared = (fmt for fmt in FORMATS.values() if fmt.is_declared(checkpoint))
    marked = (fmt for fmt in FORMATS.values() if fmt.is_marked(names))
    found = next(declared, None) or next(marked, None) or _lineage_of_plain_names(checkpoint)
    if found:
        return found
    if has_plain_names(names):
        raise ConversionError(
            f"{checkpoint.called} has the names that several lineages share, but they resample positions and normalise "
            f"images differently: say which with --format {_possible(names)}."
        )
    near = nearest(names)
    hint = f"the nearest is {near.name} ({near.title})" if near else "no tensor has a name of any"
    raise ConversionError(
        f"{checkpoint.called} holds {len(names)} tensors of no known format, first {min(names, default='none')}; "
        f"{prefix_hint(names) or hint}. Formats: {', '.join(FORMATS)}."
    )


def known_prefixes(names: Mapping[str, object]) -> list[tuple[str, CheckpointFormat]]:
    """Prefixes without which more of a ViT's names are a format's, averaged weights first, and that format."""
    here, found = nearest(names), []
    for prefix in filter(None, vit_prefixes(names)):
        inside = {name.removeprefix(f"{prefix}."): name for name in names if name.startswith(f"{prefix}.")}
        near = nearest(inside)
        if near and near.num_known(inside) > (here.num_known(names) if here else 0):
            found.append((prefix, near))
    return found


def prefix_hint(names: Mapping[str, object]) -> str:
    """Under which prefix a ViT lies, and how to convert it; "" where there is none."""
    for (prefix, near), *others in filter(None, [known_prefixes(names)]):
        also = f" (and those without {', '.join(repr(other) for other, _ in others)})" if others else ""
        return f"without the prefix {prefix!r} the names{also} are nearest to {near.name}'s: give --weights {prefix}"
    return ""


def without_useless_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint without a prefix that all its names have and no format knows."""
    names = checkpoint.infos
    for prefix in vit_prefixes(names)[:1]:
        if prefix and all(name.startswith(f"{prefix}.") for name in names) and known_prefixes(names):
            return checkpoint.under(prefix, why="all tensors of the file have it")
    return checkpoint


def _lineage_of_plain_names(checkpoint: Checkpoint) -> CheckpointFormat | None:
    """The one of several lineages with the same names, where what stands around the tower tells."""
    names, prefix = checkpoint.infos, DINO.prefix_in(checkpoint.infos)
    is_dino = prefix or any(name.startswith(("head.mlp.", "head.last_layer.")) for name in names)
    if is_dino and has_plain_names(names, prefix):
        return FORMATS["dino"]
    if not has_plain_names(names) or "head.weight" not in names:
        return None  # DINO and DINOv2 have no classifier
    is_deit = checkpoint.container in (DEIT.container, f"{DEIT.container}_ema") and "blocks.0.ls1.gamma" not in names
    return FORMATS["deit" if is_deit else "timm"]


def _possible(names: Mapping[str, object]) -> str:
    """The formats that have most of the names, the most general first."""
    complete = [fmt for fmt in reversed(FORMATS.values()) if fmt.needs.keys() <= names.keys()]
    most = max(fmt.num_known(names) for fmt in complete)
    *others, last = [fmt.name for fmt in complete if fmt.num_known(names) == most]
    return f"{', '.join(others)} or {last}" if others else last


def nearest(names: Mapping[str, object]) -> CheckpointFormat | None:
    """The format whose rules fit most of the names."""
    best = max(FORMATS.values(), key=lambda fmt: (fmt.num_known(names), fmt.is_marked(names), -len(fmt.rules)))
    return best if best.num_known(names) else None
