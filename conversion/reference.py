"""Comparing a conversion with an implementation by others, on a fixed input at the checkpoint's own image size."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import timm
import torch
import transformers
from timm.layers import QuickGELU
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitreg_hub.bundle_form import Provenance
from vitreg_hub.conversion.plan import Plan, make_plan
from vitreg_hub.conversion.source import Checkpoint
from vitreg_hub.errors import ConversionError

TRANSFORMERS_CLASSES = {
    "hf-dinov2": transformers.Dinov2Model,
    "hf-dinov2-with-registers": transformers.Dinov2WithRegistersModel,
    "hf-vit": transformers.ViTModel,
    "hf-deit": transformers.DeiTModel,
    "hf-clip": transformers.CLIPVisionModelWithProjection,
}
REFERENCE = "reference"


@torch.inference_mode()
def measure(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Run the checkpoint in another implementation and compare, without registers that it does not have.

    Returns:
        Largest absolute difference by output, and the implementation under "reference"; that alone, with the reason,
        where none can run.
    """
    request = dataclasses.replace(plan.request, num_registers=None)
    if plan.assembly.native != plan.assembly.grid:
        request = dataclasses.replace(request, img_size=None)
    own = make_plan(checkpoint, request)
    weights = {name: own.assembly.make(name).clone() for name in own.assembly.wanted}
    model = own.bundle(weights, Provenance(origin=checkpoint.called)).build()
    images = torch.randn(2, *own.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    if plan.fmt.name in TRANSFORMERS_CLASSES:
        name, theirs = _transformers(checkpoint, plan, images)
    elif plan.fmt.name in ("openclip", "openai"):
        name, theirs = _openclip(checkpoint, own, images)
    elif plan.fmt.name == "ph-reg":
        return {REFERENCE: "PH-Reg is no library"}
    else:
        name, theirs = _timm(checkpoint, own, images)
    tokens = model.forward_features(images)
    ours = {"tokens": tokens, "class token": tokens[:, 0], "output": model(images)}
    return {key: (ours[key] - tensor).abs().max().item() for key, tensor in theirs.items()} | {REFERENCE: name}


def _transformers(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Mapping[str, Tensor]]:
    kind = TRANSFORMERS_CLASSES[plan.fmt.name]
    if plan.fmt.name == "hf-clip" and not plan.num_classes:
        kind = transformers.CLIPVisionModel
    try:
        model = kind.from_pretrained(checkpoint.folder, local_files_only=True).eval()
    except OSError:
        return "transformers reads folders only, with usual names", {}
    outputs = model(images)
    if plan.fmt.name != "hf-clip":
        theirs = {"tokens": outputs.last_hidden_state}
    elif plan.num_classes:
        theirs = {"output": outputs.image_embeds}
    else:  # its last_hidden_state has not passed the final norm
        theirs = {"class token": outputs.pooler_output}
    return f"{kind.__name__} of transformers {transformers.__version__}", theirs


def _tower(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
    """The weights under the lineage's names, without prefix and containers."""
    fmt = plan.fmt
    prefix = fmt.prefix_in(checkpoint.infos)
    return {fmt.spelled(n, prefix): checkpoint.read(n) for n in checkpoint.infos if n.startswith(prefix)}


def _timm(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Mapping[str, Tensor]]:
    folded_by_timm = plan.fmt.name == "dinov2" and plan.assembly.tensors.shape("reg_token")
    args = plan.model_args | {
        "no_embed_class": bool(folded_by_timm) or not plan.assembly.other_rows,
        "num_classes": 0 if plan.fmt.name == "openclip-timm" else plan.num_classes,
    }
    model = timm.create_model(plan.spec.base, **args).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        norm.eps = norm.eps / plan.residual_scale**2
    state_dict = checkpoint_filter_fn(_tower(checkpoint, plan), model, adapt_layer_scale=True)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ConversionError(f"timm cannot load {checkpoint.called} for comparison: {error}") from error
    theirs = {"tokens": model.forward_features(images)}
    if args["num_classes"]:
        theirs["output"] = model(images)
    return f"timm {timm.__version__}", theirs


def _openclip(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Mapping[str, Tensor]]:
    if find_spec("open_clip") is None:
        return "open_clip is not installed (pip install 'vitreg_hub[clip]')", {}
    from open_clip.transformer import VisionTransformer

    args = plan.model_args
    model = VisionTransformer(
        image_size=tuple(args["img_size"]),
        patch_size=args["patch_size"],
        width=args["embed_dim"],
        layers=args["depth"],
        heads=args["num_heads"],
        mlp_ratio=args["mlp_ratio"],
        ls_init_value=args.get("init_values"),
        act_layer=QuickGELU if plan.spec.family == "clip_quickgelu" else nn.GELU,
        output_dim=plan.num_classes or args["embed_dim"],
    ).eval()
    weights = _tower(checkpoint, plan)
    if not plan.num_classes:
        model.proj = None
    model.load_state_dict(weights)
    return f"open_clip {version('open_clip_torch')}", {"output": model(images)}
