"""The ViT of a run: initialised at random or from a bundle, with its registers and its trainable part."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import VisionTransformer
from torch import nn

from vitreg_hub.arch import REGISTER_INIT_STD, get_arch
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import RecipeError
from vitreg_hub.network.kinds import is_registers, kind_of
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.recipes.published import arch_name
from vitreg_hub.training.recipes.settings import ModelSettings
from vitreg_hub.training.run.lora import add_low_rank

logger = logging.getLogger(__name__)

HEAD_INIT_STD = 0.02  # as timm and `ModelBundle.build` draw a head
BACKBONE_STREAM = 0
"""Separates the random numbers of new weights from all others of the same seed."""


def arch_of(settings: ModelSettings) -> str:
    """The architecture that settings name, or their start's, with `settings.registers` if they are given.

    Raises:
        RecipeError: No architecture has so many registers.
        VitregError: The start cannot be loaded.
    """
    if settings.arch is not None:
        return settings.arch
    spec = ModelBundle.load(cast(str, settings.start)).spec
    registers = spec.num_registers if settings.registers is None else settings.registers
    return arch_name(spec.family, spec.size, registers)


def build_backbone(
    settings: ModelSettings, *, num_classes: int, seed: int, label_names: Sequence[str] | None = None
) -> VisionTransformer:
    """Build the network, on the CPU and in training mode.

    Its head has `num_classes` outputs, 0 for none. `settings.head` says whether it is the start's, which must then have
    as many; `label_names` are the classes, where they are known.

    Raises:
        UnknownArchError: There is no such architecture.
        RecipeError: The start is of another architecture, has no such head, or nothing would be trained.
        BundleError: The start is not a bundle.
    """
    arch = cast(str, settings.arch)
    get_arch(arch)  # refuses unknown names
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
            made = timm.create_model(arch, **options)
        else:
            bundle = with_registers_of(arch, ModelBundle.load(settings.start), called=settings.start)
            made = bundle.build(**options)  # with a new head for other classes
            kept = not num_classes or keeps_head(bundle, settings, num_classes=num_classes, label_names=label_names)
            if not kept and bundle.num_classes == num_classes:
                for head in bundle.kind.heads:
                    layer = cast(nn.Linear, made.get_submodule(head))
                    trunc_normal_(layer.weight, std=HEAD_INIT_STD)
                    nn.init.zeros_(layer.bias)
    model = cast(VisionTransformer, made)
    if settings.drop_path:
        set_drop_path(model, settings.drop_path)
    set_trainable(model, settings.trainable, lora_rank=settings.lora_rank)
    return model.train()


def keeps_head(
    bundle: ModelBundle, settings: ModelSettings, *, num_classes: int, label_names: Sequence[str] | None
) -> bool:
    """Whether a run of classification begins with its start's head.

    Raises:
        RecipeError: It should and cannot, or a new head would stay random.
    """
    start, theirs = f"model.start {settings.start}", bundle.label_names
    same = bundle.num_classes == num_classes
    why = f"{start} has {bundle.num_classes} classes and the data have {num_classes}"
    if same and theirs and label_names and tuple(theirs) != tuple(label_names):
        first = next(pair for pair in zip(theirs, label_names, strict=True) if pair[0] != pair[1])
        same, why = False, f"{start} has the class {first[0]!r} where the data have {first[1]!r}"
    if settings.head == "kept" and bundle.num_classes != num_classes:
        raise RecipeError(f"model.head is kept, but {why}: let it be new, or take data of the same classes.")
    kept = settings.head == "kept" or (settings.head == "auto" and same)
    if not kept and settings.trainable.startswith("registers"):
        why = why if settings.head == "auto" else "model.head is new"
        raise RecipeError(
            f"model.trainable is {settings.trainable}, but {why}: a new head would stay random, so train all, head, "
            "last:N or lora."
        )
    logger.info("%s", f"the head of {start} is kept" if kept else f"the head is new, with {num_classes} classes")
    return kept


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


def set_trainable(model: VisionTransformer, which: str, *, lora_rank: int = 8) -> None:
    """Train the weights that `ModelSettings.trainable` names, after giving the network those that it lacks for that.

    Raises:
        RecipeError: There are no registers, no head or not so many blocks to train.
    """
    if which == "all":
        return
    kind = kind_of(model)
    if which == "lora":
        add_low_rank(model, lora_rank)
        for head in kind.heads:
            model.get_submodule(head).requires_grad_(True)
        return
    if which == "head" or which.startswith("last:"):
        if which == "head" and not model.num_classes:
            raise RecipeError("model.trainable is head, but this task has no classifier: take all or last:N.")
        first = len(model.blocks) - int(which.partition(":")[2] or 0)
        if first < 0:
            raise RecipeError(f"model.trainable is {which}, but the network has {len(model.blocks)} blocks.")
        parts = [f"blocks.{number}." for number in range(first, len(model.blocks))]
        if parts:
            parts += ["norm.", "fc_norm."]
        for name, parameter in model.named_parameters():
            parameter.requires_grad = kind.is_of_head(name) or name.startswith(tuple(parts))
        return
    if not kind.num_registers(model):
        raise RecipeError(f"model.trainable is {which}, but the architecture has no registers: take one that has some.")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for name, parameter in model.named_parameters():
        of_norm = which == "registers+norms" and name.rpartition(".")[0] in norms
        parameter.requires_grad = is_registers(name) or of_norm
