"""timm's networks: what an empty one tells about itself, and running one with a checkpoint's weights."""

from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.layers import Attention, GELUTanh, QuickGELU, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.kinds import KINDS, kind_of
from vitreg_hub.network.residual_scale import stream_norms

ACTIVATIONS: dict[type, str] = {
    nn.GELU: "gelu",
    QuickGELU: "quick_gelu",
    GELUTanh: "gelu_tanh",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}

NO_POOLING = "the config pools nothing: the bundle pools by its class token, and its tokens are all as they were"

MAX_DEPTH = 100
"""Blocks that a config may ask timm to build."""

NO_NETWORK_ARGS = {"checkpoint_path", "cache_dir", "features_only"}
NO_NETWORK_ARGS |= {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}
"""Arguments of `timm.create_model` that read files or change the class; somebody else's config may not give them."""


def facts_of_network(architecture: str, args: Mapping[str, Any], *, has_head: bool = False) -> Facts:
    """Facts about a timm model, read from its empty network.

    Args:
        architecture: timm's name.
        args: Arguments of `timm.create_model`.
        has_head: Whether the checkpoint has a head, which reads what the network pools.

    Raises:
        ConversionError: timm has no such model, or no bundle can hold it.
    """
    if not timm.is_model(architecture):
        raise ConversionError(f"timm {timm.__version__} has no model {architecture!r}, which the config names.")
    if foreign := sorted(args.keys() & NO_NETWORK_ARGS):
        raise ConversionError(
            f"the config gives {', '.join(foreign)} to {architecture}, which do not describe a network."
        )
    if args.get("depth", 1) > MAX_DEPTH:
        raise ConversionError(f"the config gives {architecture} {args['depth']} blocks, which is no ViT.")
    model = cast(VisionTransformer, timm.create_model(architecture, device="meta", **args))
    if type(model) not in [kind.timm_class for kind in KINDS.values()]:
        raise ConversionError(f"{architecture} is timm's {type(model).__name__}, not its VisionTransformer.")
    first = cast(Block, model.blocks[0])
    if type(first.mlp.act) not in ACTIVATIONS or isinstance(first.mlp, SwiGLU):
        raise ConversionError(f"{architecture} has an MLP that no row of the table has.")
    if type(first) is not Block or not isinstance(first.norm1, nn.LayerNorm):
        raise ConversionError(f"{architecture} has blocks or norms that no row of the table has.")
    if not model.global_pool and has_head:
        raise ConversionError(
            f"the config lets {architecture} pool nothing (global_pool is ''), so its head gives an output for every "
            "token, which no bundle does: set global_pool to 'token' or 'avg' there, whichever the head is meant for."
        )
    if model.global_pool not in ("token", "avg", "") or model.pool_include_prefix:
        raise ConversionError(f"{architecture} pools by {model.global_pool!r}, which these architectures do not.")
    return Facts(
        num_heads=cast(Attention, first.attn).num_heads,
        norm_eps=first.norm1.eps,
        act=ACTIVATIONS[type(first.mlp.act)],
        img_size=model.patch_embed.img_size,
        other_rows=0 if model.no_embed_class else model.num_prefix_tokens,
        global_pool=model.global_pool or "token",
        assumptions=() if model.global_pool else (NO_POOLING,),
        shape={
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "patch_size": model.patch_embed.patch_size,
            "num_registers": kind_of(model).num_registers(model),
            "hidden": first.mlp.get_parameter("fc1.weight").shape[0],
        },
    )


def run_timm(
    architecture: str,
    args: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    images: Tensor,
    *,
    norm_eps: float | None = None,
) -> tuple[str, Mapping[str, Tensor]]:
    """Run weights under the lineage's names on images [B, C, H, W], through timm's own filter of checkpoints.

    Returns:
        The library, and tokens [B, N, D] and, with a head, output [B, E].
    """
    args = dict(args)
    if "register_tokens" in weights:
        args["no_embed_class"] = True  # timm's filter then adds the class token's position to it
    if "head.weight" not in weights:
        args["num_classes"] = 0
    model = cast(VisionTransformer, timm.create_model(architecture, **args)).eval()
    if norm_eps is not None:
        for norm in stream_norms(model):
            norm.eps = norm_eps
    model.load_state_dict(checkpoint_filter_fn(dict(weights), model, adapt_layer_scale=True))
    outputs = {"tokens": model.forward_features(images)}
    if args["num_classes"]:
        outputs["output"] = model(images)
    return f"timm {timm.__version__}", outputs
