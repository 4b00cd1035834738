"""Comparing a conversion with an implementation by others, on a fixed input at the checkpoint's own image size."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import timm
import torch
import transformers
from timm.layers import QuickGELU
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.conversion.checkpoint.opening import WEIGHT_NAMES, Checkpoint
from vitreg_hub.conversion.planning.plan import Plan, make_plan
from vitreg_hub.network.residual_scale import stream_norms

REFERENCE = "reference"
Outputs = Mapping[str, Tensor]


@torch.inference_mode()
def measure(checkpoint: Checkpoint, plan: Plan, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run the checkpoint in another implementation and compare, at its own image size and without new registers.

    Args:
        checkpoint: The source.
        plan: What it became.
        state_dict: The weights of the bundle, which are compared if they have neither of these changes.

    Returns:
        Largest absolute difference by output, and the implementation under "reference"; that alone, with the reason,
        where none can run.
    """
    run = _reference(plan)
    if run is None:
        return {REFERENCE: f"{plan.fmt.title} have no library"}
    own, weights, changes = plan, state_dict, ""
    if plan.assembly.num_new_registers or plan.assembly.native != plan.assembly.grid:
        size = plan.request.img_size if plan.assembly.native == plan.assembly.grid else None
        own = make_plan(checkpoint, dataclasses.replace(plan.request, num_registers=None, img_size=size))
        weights = {name: own.assembly.make(name).clone() for name in own.assembly.wanted}
        changes = ", without new registers" if plan.assembly.num_new_registers else ""
    model = own.bundle(weights, Provenance(origin=checkpoint.called)).build()
    images = torch.randn(2, *own.config.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    try:
        name, theirs = run(checkpoint, own, images)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        return {REFERENCE: f"the reference implementation cannot load it: {reason}"}
    tokens = model.forward_features(images)
    ours = {"tokens": tokens, "class token": tokens[:, 0], "output": model(images)}
    height, width = images.shape[2:]
    differences = {key: (ours[key] - tensor).abs().max().item() for key, tensor in theirs.items()}
    return differences | {REFERENCE: f"{name} on images of {height}x{width}{changes}" if theirs else name}


def _reference(plan: Plan) -> Callable[[Checkpoint, Plan, Tensor], tuple[str, Outputs]] | None:
    if plan.fmt.name == "ph-reg":
        return None
    if plan.fmt.library == "transformers":
        return _transformers
    return _timm if plan.fmt.name == "openclip-timm" or plan.fmt.library != "open_clip" else _openclip


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its report of tensors that a class does not take, and without its bar."""
    logs = transformers.logging
    verbosity, had_bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if had_bar:
            logs.enable_progress_bar()


def _transformers(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Outputs]:
    has_head = plan.config.num_classes > 0
    kind = {
        "hf-dinov2": transformers.Dinov2Model,
        "hf-dinov2-with-registers": transformers.Dinov2WithRegistersModel,
        "hf-vit": transformers.ViTForImageClassification if has_head else transformers.ViTModel,
        "hf-deit": transformers.DeiTForImageClassificationWithTeacher if has_head else transformers.DeiTModel,
        "hf-clip": transformers.CLIPVisionModelWithProjection if has_head else transformers.CLIPVisionModel,
    }[plan.fmt.name]
    usual = [name for name in WEIGHT_NAMES if (checkpoint.folder / name).exists()]
    if len(checkpoint.files) == 1 and checkpoint.files[0].name not in usual[:1]:
        return "transformers reads folders only, with its own names of files", {}
    with _quiet_transformers():
        model = kind.from_pretrained(checkpoint.folder, local_files_only=True, dtype=torch.float32).eval()
    given = model(images)
    if plan.fmt.name == "hf-clip":  # its last_hidden_state has not passed the final norm
        theirs = {"output": given.image_embeds} if has_head else {"class token": given.pooler_output}
    elif has_head:
        theirs = {"tokens": model.base_model(images).last_hidden_state, "output": given.logits}
    else:
        theirs = {"tokens": given.last_hidden_state}
    return f"{kind.__name__} of transformers {transformers.__version__}", theirs


def _tower(checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
    """The weights under the lineage's names, without prefix and containers."""
    fmt = plan.fmt
    prefix = fmt.prefix_in(checkpoint.infos)
    return {fmt.spelled(n, prefix): checkpoint.read(n) for n in checkpoint.infos if n.startswith(prefix)}


def _timm(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Outputs]:
    config = checkpoint.config if plan.fmt.library == "timm" else {}
    if "architecture" in config:
        base, args = config["architecture"], dict(config.get("model_args") or {})
        args.setdefault("img_size", plan.config.model_args["img_size"])
    else:
        # timm's own filter folds the class token's position where there are registers
        folds = plan.fmt.name == "dinov2" and "reg_token" in plan.assembly.tensors
        base, args = (
            plan.config.spec.base,
            plan.config.model_args | {"no_embed_class": folds or not plan.assembly.other_rows},
        )
    args["num_classes"] = 0 if plan.fmt.name == "openclip-timm" else plan.config.num_classes
    model = timm.create_model(base, **args).eval()
    if not plan.assembly.is_scaled:
        for norm in stream_norms(model):
            norm.eps = plan.config.norm_eps
    model.load_state_dict(checkpoint_filter_fn(_tower(checkpoint, plan), model, adapt_layer_scale=True))
    theirs = {"tokens": model.forward_features(images)}
    if args["num_classes"]:
        theirs["output"] = model(images)
    return f"timm {timm.__version__}", theirs


def _openclip(checkpoint: Checkpoint, plan: Plan, images: Tensor) -> tuple[str, Outputs]:
    if find_spec("open_clip") is None:
        return "open_clip is not installed: pip install 'vitreg_hub[clip]'", {}
    from open_clip.transformer import VisionTransformer

    args = plan.config.model_args
    model = VisionTransformer(
        image_size=tuple(args["img_size"]),
        patch_size=args["patch_size"],
        width=args["embed_dim"],
        layers=args["depth"],
        heads=args["num_heads"],
        mlp_ratio=args["mlp_ratio"],
        ls_init_value=args.get("init_values"),
        act_layer=QuickGELU if plan.config.activation == "quick_gelu" else nn.GELU,
        output_dim=plan.config.num_classes or args["embed_dim"],
    ).eval()
    if not plan.config.num_classes:
        model.proj = None
    model.load_state_dict(_tower(checkpoint, plan))
    return f"open_clip {version('open_clip_torch')}", {"output": model(images)}
