"""The ViT of a run: initialised at random or from a bundle, with its registers and its trainable part."""

from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from timm.models import VisionTransformer
from torch import nn

from vitreg_hub.arch import REGISTER_INIT_STD, get_arch
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import RecipeError
from vitreg_hub.network.kinds import is_registers, kind_of
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.recipes.settings import ModelSettings, Trainable

BACKBONE_STREAM = 0
"""Separates the random numbers of new weights from all others of the same seed."""


def build_backbone(settings: ModelSettings, *, num_classes: int, seed: int) -> VisionTransformer:
    """Build the network, on the CPU and in training mode.

    Its head has `num_classes` outputs, 0 for none; a start's head of another width is replaced.

    Raises:
        UnknownArchError: There is no such architecture.
        RecipeError: The start is of another architecture, or nothing would be trained.
        BundleError: The start is not a bundle.
    """
    get_arch(settings.arch)  # refuses unknown names
    given = {"img_size": settings.img_size, "patch_size": settings.patch_size}
    options: dict[str, Any] = {"num_classes": num_classes, "dynamic_img_size": True}
    options |= {name: size for name, size in given.items() if size is not None}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, BACKBONE_STREAM))
        if settings.start is None:
            if settings.trainable != "all":
                raise RecipeError(
                    f"model.trainable is {settings.trainable}, but there is no model.start: all else would stay random."
                )
            if settings.layer_scale is not None:
                options["init_values"] = settings.layer_scale
            made = timm.create_model(settings.arch, **options)
        else:
            bundle = with_registers_of(settings.arch, ModelBundle.load(settings.start), called=settings.start)
            if settings.trainable != "all" and num_classes not in (0, bundle.num_classes):
                raise RecipeError(
                    f"model.trainable is {settings.trainable}, but model.start {settings.start} has "
                    f"{bundle.num_classes} classes and the data have {num_classes}: a new head needs all to be trained."
                )
            made = bundle.build(**options)
    model = cast(VisionTransformer, made)
    if settings.drop_path:
        set_drop_path(model, settings.drop_path)
    set_trainable(model, settings.trainable)
    return model.train()


def with_registers_of(arch: str, bundle: ModelBundle, *, called: str) -> ModelBundle:
    """Draw or drop registers of a bundle, which have no positions, until it has as many as an architecture.

    Raises:
        RecipeError: The bundle differs from the architecture in more than registers.
    """
    wanted, spec = get_arch(arch), bundle.spec
    if (spec.family, spec.size) != (wanted.family, wanted.size):
        raise RecipeError(
            f"model.start {called} is a {bundle.arch}, but model.arch is {arch}: only the number of registers may "
            f"differ, so set model.arch to {spec.name} or one of its siblings."
        )
    if spec.num_registers == wanted.num_registers:
        return bundle
    kind = bundle.kind
    weights = {name: tensor for name, tensor in bundle.state_dict.items() if name != kind.registers}
    if wanted.num_registers:
        shape = (1, wanted.num_registers, bundle.embed_dim)
        old = bundle.state_dict.get(kind.registers, torch.empty(1, 0, shape[2]))[:, : shape[1]]
        drawn = torch.randn(1, shape[1] - old.shape[1], shape[2]) * (REGISTER_INIT_STD * bundle.residual_scale)
        weights[kind.registers] = torch.cat([old, drawn.to(old.dtype)], dim=1)
    args = {**bundle.model_args, kind.registers_argument: wanted.num_registers}
    return replace(bundle, arch=arch, model_args=args, state_dict=weights)


def set_drop_path(model: VisionTransformer, probability: float) -> None:
    """Skip every branch of every block with the same probability; timm would raise it from block to block.

    Source: deit/models_v2.py (`dpr = [drop_path_rate for i in range(depth)]`), dinov2 (`drop_path_uniform`).
    """
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(probability), DropPath(probability)


def set_trainable(model: VisionTransformer, which: Trainable) -> None:
    """Train all weights, only the registers, or registers and norms.

    Raises:
        RecipeError: There are no registers to train.
    """
    if which == "all":
        return
    if not kind_of(model).num_registers(model):
        raise RecipeError(f"model.trainable is {which}, but the architecture has no registers: take one that has some.")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        of_norm = which == "registers+norms" and name.rpartition(".")[0] in norms
        parameter.requires_grad = is_registers(name) or of_norm
