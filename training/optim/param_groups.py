"""Groups of parameters for the optimiser: which ones decay, and how their rates are scaled."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from vitreg_hub.network.kinds import KINDS
from vitreg_hub.training.recipes.settings import DecayRule

_EMBEDDINGS = {name for kind in KINDS.values() for name in kind.embeddings}  # timm's VisionTransformer.no_weight_decay
_CLIP_EMBEDDINGS = {"positional_embedding", "class_embedding", "cls_emb", "logit_scale", "logit_bias"}
_BEFORE_BLOCKS = _EMBEDDINGS | {"patch_embed", "mask_token", "norm_pre"}
_CLASSIFIERS = {name for kind in KINDS.values() for name in kind.heads}


def param_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    depth: int,
    rule: DecayRule,
    layer_decay: float = 1.0,
    patch_embed_lr: float = 1.0,
) -> list[dict[str, Any]]:
    """Sort the trained parameters into groups.

    Args:
        named_parameters: Those of a ViT, or of a module whose child `backbone` is one and whose other children are
            heads.
        depth: Number of the ViT's blocks.
        rule: What has no weight decay. "dinov2": biases, norms and layer scale; tokens and positions decay. "timm":
            vectors, positions, class token and registers. "openclip": the same, and CLIP's own embeddings and scales.
        layer_decay: Factor of the rate from each block to the one below; everything before the blocks counts as one
            block more. Not for heads.
        patch_embed_lr: Further factor of the patch embedding's rate.

    Returns:
        Groups in the order of their first parameters: `params`, `names`, `lr_scale` and `wd_scale` (factors of the rate
        and the weight decay), `last_layer` (whether it is a DINO head's last layer) and `role` ("backbone" or "head",
        the ViT's classifier being a head).

    Source: dinov2/utils/param_groups.py (Apache-2.0); timm/optim/_param_groups.py (Apache-2.0);
    open_clip_train/main.py and open_clip/transformer.py (MIT).
    """
    named = [(name, name.split("."), parameter) for name, parameter in named_parameters]
    has_heads = any("backbone" in parts for _, parts, _ in named)  # even if the backbone is frozen
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parts, parameter in named:
        if not parameter.requires_grad:
            continue
        is_head = (has_heads and "backbone" not in parts) or not _CLASSIFIERS.isdisjoint(parts)
        settings = {
            "lr_scale": 1.0 if is_head else _lr_scale(parts, depth, layer_decay, patch_embed_lr),
            "wd_scale": float(_DECAYS[rule](name, parameter)),
            "last_layer": "last_layer" in parts,
            "role": "head" if is_head else "backbone",
        }
        group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _lr_scale(parts: list[str], depth: int, layer_decay: float, patch_embed_lr: float) -> float:
    layer = depth + 1
    if not _BEFORE_BLOCKS.isdisjoint(parts):
        layer = 0
    elif "blocks" in parts:
        layer = int(parts[parts.index("blocks") + 1]) + 1
    return layer_decay ** (depth + 1 - layer) * (patch_embed_lr if "patch_embed" in parts else 1.0)


def _decays_in_timm(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith(".bias") and name.rpartition(".")[2] not in _EMBEDDINGS


_DECAYS: dict[DecayRule, Callable[[str, Tensor], bool]] = {
    "dinov2": lambda name, _: not (name.endswith(".bias") or re.search("norm|gamma", name)),
    "timm": _decays_in_timm,
    "openclip": lambda name, x: _decays_in_timm(name, x) and name.rpartition(".")[2] not in _CLIP_EMBEDDINGS,
}
