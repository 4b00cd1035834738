"""All formats, how one is recognised, and look-alikes that are refused."""

import difflib
import re
from collections.abc import Mapping

from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.clip import HF_CLIP, OPENAI, OPENCLIP, OPENCLIP_TIMM
from vitreg_hub.conversion.formats.dinov2 import DINO, DINOV2
from vitreg_hub.conversion.formats.hugging_face import HF_DEIT, HF_DINOV2, HF_DINOV2_REGISTERS, HF_VIT, PH_REG
from vitreg_hub.conversion.formats.rules import CheckpointFormat
from vitreg_hub.conversion.formats.vit import DEIT, DEIT3, TIMM
from vitreg_hub.errors import ConversionError

FORMATS: dict[str, CheckpointFormat] = {
    fmt.name: fmt
    for fmt in (
        # the marks of an earlier one may contain those of a later one
        OPENCLIP_TIMM,
        OPENCLIP,
        OPENAI,
        HF_CLIP,
        PH_REG,
        HF_DINOV2_REGISTERS,
        HF_DINOV2,
        HF_DEIT,
        HF_VIT,
        DEIT3,
        DEIT,
        DINOV2,
        TIMM,
        DINO,
    )
}

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
"""Names that only other networks have, and what these are."""

ARCHIVE_NUMBERS = {"input_resolution", "context_length", "vocab_size"}


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
    """Refuse networks that are no plain ViT.

    Raises:
        ConversionError: With the reason.
    """
    names = checkpoint.infos
    for pattern, reason in REFUSED.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise ConversionError(f"{checkpoint.called} {reason} (it holds {found}).")
    if "embeddings.register_tokens" in {n.rpartition("model.")[2] for n in names} and not any(
        n.endswith("embeddings.position_embeddings") for n in names
    ):
        raise ConversionError(f"{checkpoint.called} {DINOV3}.")
    masks = [info.shape for name, info in names.items() if name.rpartition(".")[2] == "mask_token"]
    if any(len(shape) == 3 for shape in masks) and not any("embeddings." in name for name in names):
        raise ConversionError(
            f"{checkpoint.called} is a masked autoencoder or BEiT (its mask_token has three dimensions), "
            "not one of the lineages that are converted."
        )


def detect(checkpoint: Checkpoint) -> CheckpointFormat:
    """Recognise the format of a checkpoint by its names, its container and the config beside it.

    Raises:
        ConversionError: No format, or several that read other images or other sizes differently.
    """
    names = checkpoint.infos
    if checkpoint.container == "torchscript" or ARCHIVE_NUMBERS & names.keys():
        if not OPENCLIP.is_marked(names):
            raise ConversionError(
                f"{checkpoint.called} is a TorchScript archive; only OpenAI's CLIP is read in that form."
            )
        return OPENAI
    if "architecture" in checkpoint.config and _fit(TIMM, names) == len(names):
        return TIMM
    for fmt in FORMATS.values():
        if fmt.is_marked(names):
            return fmt
    prefix = DINO.prefix_in(names)
    if f"{prefix}blocks.0.attn.qkv.weight" in names and f"{prefix}patch_embed.proj.weight" in names:
        return _plain_layout(checkpoint, prefix)
    near = nearest(names)
    hint = f"the nearest is {near.name} ({near.title})" if near else "no tensor has a name of any"
    first = min(names, default="").partition(".")[0]
    inner = {name.removeprefix(f"{first}."): name for name in names}
    if all(name.startswith(f"{first}.") for name in names) and (near := nearest(inner)):
        hint = f"without the prefix {first!r} the names are nearest to {near.name}'s: save them without it"
    raise ConversionError(
        f"{checkpoint.called} holds {len(names)} tensors of no known format, first {min(names, default='none')}; "
        f"{hint}. Formats: {', '.join(FORMATS)}."
    )


def _plain_layout(checkpoint: Checkpoint, prefix: str) -> CheckpointFormat:
    """timm, DeiT and DINO name all tensors alike; what stands around the weights tells them apart, or nothing does."""
    names, has_head = checkpoint.infos, "head.weight" in checkpoint.infos
    if prefix or any(name.startswith(("head.mlp.", "head.last_layer.")) for name in names):
        return DINO
    has_scale = "blocks.0.ls1.gamma" in names
    if checkpoint.container == "model" and has_head and not has_scale:
        return DEIT
    if has_head:
        return TIMM
    fitting = "timm or dinov2" if has_scale else "timm, deit or dino"
    raise ConversionError(
        f"{checkpoint.called} has the names that several lineages share, but they resample positions and normalise "
        f"images differently: say which with --format {fitting}."
    )


def nearest(names: Mapping[str, object]) -> CheckpointFormat | None:
    """The format whose rules fit most of the names."""
    best = max(FORMATS.values(), key=lambda fmt: (_fit(fmt, names), fmt.is_marked(names), -len(fmt.rules)))
    return best if _fit(best, names) else None


def _fit(fmt: CheckpointFormat, names: Mapping[str, object]) -> int:
    """How many of the names have a rule."""
    prefix = fmt.prefix_in(names)
    if fmt.needs_prefix and not prefix:
        return 0
    return sum(len(fmt.rules_for(name, prefix)) == 1 for name in names)
