"""Comparing a conversion with somebody else's implementation on a fixed input at the checkpoint's own image size."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.planning.plan import Plan, make_plan
from vitreg_hub.errors import ConversionError

REFERENCE = "reference"


@torch.inference_mode()
def measure(plan: Plan, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare a bundle's weights with another implementation; a bundle as the checkpoint is, where the plan changes it.

    Returns:
        Largest absolute difference by output, with the implementation under "reference"; where none can run, only the
        reason under "reference".
    """
    own, weights, changes = plan, state_dict, ""
    checkpoint, request, is_native = plan.tensors.checkpoint, plan.choices.request, plan.native == plan.config.grid
    if plan.num_new_registers or not is_native:
        size = request.img_size if is_native else None
        own = make_plan(checkpoint, dataclasses.replace(request, num_registers=None, img_size=size))
        weights = {name: own.make(name).clone() for name in own.wanted}
        changes = ", without new registers" if plan.num_new_registers else ""
    bundle = ModelBundle.of(own.config, weights)
    images = torch.randn(2, *own.config.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    try:
        name, theirs = plan.tensors.fmt.run_reference(checkpoint, bundle, images)
    except ConversionError as error:
        return {REFERENCE: str(error)}
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        return {REFERENCE: f"the reference implementation cannot load it: {reason}"}
    model = cast(VisionTransformer, bundle.build())
    tokens = model.forward_features(images)
    ours = {"tokens": tokens, "class token": tokens[:, 0], "output": model(images)}
    height, width = images.shape[2:]
    differences = {key: (ours[key] - tensor).abs().max().item() for key, tensor in theirs.items()}
    return differences | {REFERENCE: f"{name} on images of {height}x{width}{changes}"}
