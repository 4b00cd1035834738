"""Comparing a bundle with somebody else's implementation of the checkpoint, at its own image size and at another."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.bundle.config import BundleConfig
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.planning.plan import Plan, make_plan
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.position_rule import Grid

REFERENCE = "reference"
FAILS = (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError)
"""What somebody else's code raises where it cannot load or run a checkpoint."""


@torch.inference_mode()
def measure(plan: Plan, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare a bundle's weights with another implementation, at the bundle's size and at one other.

    At the other size the bundle resamples the checkpoint's own position table, as the implementation does. New
    registers are left out, as they change what a network computes.

    Returns:
        Largest absolute difference by output, with the implementation and the sizes under "reference"; where none can
        run, only the reason under "reference".
    """
    checkpoint, own = plan.tensors.checkpoint, plan
    if plan.num_new_registers:
        own = make_plan(checkpoint, dataclasses.replace(plan.choices.request, num_registers=None))
    is_alike = own.config.residual_scale == plan.config.residual_scale and not plan.distillation_is_register
    kept = state_dict if is_alike else {}
    weights = {
        name: kept[name] if name in kept and tuple(kept[name].shape) == shape else own.make(name)
        for name, shape in own.wanted.items()
    }
    side = own.config.patch_size
    native = _sized(own.config, (own.native[0] * side, own.native[1] * side))
    table = dataclasses.replace(own, config=native).make("pos_embed")
    bundles = (
        (ModelBundle.of(own.config, weights), own.config.img_size),
        (ModelBundle.of(native, weights | {"pos_embed": table}), _another(own.config.grid, own.native, side)),
    )
    found: dict[str, float] = {}
    name, sizes, failed = "", [], ""
    for bundle, size in bundles:
        images = torch.randn(2, bundle.preprocess.input_size[0], *size, generator=torch.Generator().manual_seed(0))
        like = ModelBundle.of(_sized(own.config, size), bundle.state_dict)
        try:
            name, theirs = plan.tensors.fmt.run_reference(checkpoint, like, images, native=own.native)
        except ConversionError as error:
            failed = str(error)
        except FAILS as error:
            reason = str(error).strip().partition("\n")[0]
            failed = f"the reference implementation cannot load it: {reason}"
        else:
            for key, difference in _differences(bundle.build(img_size=size), images, theirs):
                found[key] = max(difference, found.get(key, 0))
            sizes.append(f"{size[0]}x{size[1]}")
        if not found:
            return {REFERENCE: failed}
    said = f"{name} on images of {' and '.join(sizes)}"
    said += ", without new registers" if plan.num_new_registers else ""
    return {**found, REFERENCE: f"{said}; at another size {failed}" if failed else said}


def _differences(model: torch.nn.Module, images: Tensor, theirs: Mapping[str, Tensor]) -> list[tuple[str, float]]:
    tokens = cast(VisionTransformer, model).forward_features(images)
    ours = {"tokens": tokens, "class token": tokens[:, 0], "output": model(images)}
    return [(key, (ours[key] - tensor).abs().max().item()) for key, tensor in theirs.items()]


def _sized(config: BundleConfig, size: tuple[int, int]) -> BundleConfig:
    """The config of the same network for images of another height and width."""
    channels = config.preprocess.input_size[0]
    return dataclasses.replace(
        config,
        model_args={**config.model_args, "img_size": list(size)},
        preprocess=dataclasses.replace(config.preprocess, input_size=(channels, *size)),
    )


def _another(grid: Grid, native: Grid, side: int) -> tuple[int, int]:
    """A size in pixels that is smaller, as rules differ most there."""
    height, width = (max(1, patches * 2 // 3) for patches in grid)
    if (height, width) in (grid, native):
        height, width = height + 1, width + 1
    return height * side, width * side
