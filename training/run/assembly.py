"""From a recipe to the parts of a run: processes, data, network and task."""

import logging
from copy import deepcopy
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from timm.data import create_transform, resolve_model_data_config
from timm.models import VisionTransformer
from torch import nn

from vitreg_hub.compat import forget_accelerator
from vitreg_hub.errors import RecipeError
from vitreg_hub.images.pictures import Gray
from vitreg_hub.images.source import ImageSource, Transform
from vitreg_hub.training.data.augment import build_augment
from vitreg_hub.training.data.classes import open_data
from vitreg_hub.training.data.loader import TrainLoader, require_needs
from vitreg_hub.training.data.opening import TrainingData, as_image_source
from vitreg_hub.training.distributed.parallel import blocks_of
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.backbone import arch_of, build_backbone
from vitreg_hub.training.run.lora import merge_low_rank
from vitreg_hub.training.run.origins import Source, sources_of
from vitreg_hub.training.schedules import Span
from vitreg_hub.training.tasks.base import RunFacts, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a run is made of, before it is distributed over devices.

    Attributes:
        arch: The network's architecture.
        held_out: The data that scores are measured on, if any.
        eval_images: Images to evaluate: held-out ones, or else training images, but only for artifacts.
        knn_images: Training images without augmentation, among which k-NN finds the neighbours of held-out ones.
        mean: Of each channel, in training and evaluation, as `std`.
        twin: Copy of the model that the task publishes, in evaluation mode, unsharded and on the CPU.
        sources: The models that the run starts from and learns from.
    """

    arch: str
    data: TrainingData
    held_out: ImageSource | None
    eval_images: ImageSource
    knn_images: ImageSource | None
    loader: TrainLoader
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    span: Span
    task: Task
    twin: nn.Module
    sources: tuple[Source, ...]


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Join the processes that the launcher started.

    Raises:
        RecipeError: The device or the sharding does not allow what the recipe asks for.
    """
    has_device = torch.accelerator.is_available()
    if recipe.scale.precision == "fp16" and not has_device:
        raise RecipeError("scale.precision is fp16, which needs a GPU: take bf16 or no.")
    if recipe.scale.sharding == "fsdp2" and "muon" in recipe.optim.opt:
        raise RecipeError(
            f"optim.opt {recipe.optim.opt} needs whole matrices, which fsdp2 cuts: take adamw, or scale.sharding ddp."
        )
    forget_accelerator()  # left by an earlier run of this process, perhaps with another precision
    return Accelerator(
        cpu=not has_device,  # otherwise processes without a GPU would not find each other
        mixed_precision=recipe.scale.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )


def assemble(recipe: Recipe, *, rank: int, world_size: int) -> Parts:
    """Open the data and build the network and the objective.

    Raises:
        RecipeError: Settings contradict each other, the data, or the number of processes.
        DataError: There are no such images, or they have no labels or captions where the task needs them.
        BundleError: The start or the teacher is not a bundle.
    """
    data, rows_held_out, notes = open_data(recipe.data, needs=recipe.task.needs, seed=recipe.seed)
    for note in notes if rank == 0 else ():
        logger.warning("%s", note)
    require_needs(data, recipe.task.needs)
    num_classes = data.num_classes if recipe.task.classifies else 0
    if num_classes is None:
        raise RecipeError(
            f"{data.name} does not say how many classes it has: give data.num_classes, or a column of class labels "
            "(data.label_column)."
        )
    arch = arch_of(recipe.model)
    model = replace(recipe.model, arch=arch, registers=None)
    backbone = build_backbone(model, num_classes=num_classes, seed=recipe.seed, label_names=data.label_names)
    config = resolve_model_data_config(backbone)
    config["input_size"] = (3, *backbone.patch_embed.img_size)
    in_chans = backbone.patch_embed.proj.in_channels
    if in_chans not in (1, 3):
        raise RecipeError(
            f"the model takes images of {in_chans} channels, but those of {data.name} have 3: train a model of 3 "
            "channels, or of 1, for which they turn grey."
        )
    augment = build_augment(
        recipe.augment,
        in_chans=in_chans,
        img_size=config["input_size"][1],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
    )
    loader = TrainLoader(
        data=data,
        transform=augment,
        batch_size=recipe.batch_size,
        rank=rank,
        world_size=world_size,
        accumulate=recipe.scale.accumulate,
        seed=recipe.seed,
        repeats=getattr(recipe.augment, "repeats", 1),
        num_workers=recipe.data.num_workers,
        max_corrupt=recipe.data.max_corrupt,
        needs=recipe.task.needs,
    )
    held_out = rows_held_out and as_image_source(rows_held_out)
    epoch_steps = recipe.epoch_steps or loader.steps_per_epoch
    span = Span(epoch_steps=epoch_steps, total_steps=max(round(recipe.epochs * epoch_steps), 1))
    label_names = (held_out and held_out.label_names) or data.label_names
    run = RunFacts(span=span, batch_size=recipe.batch_size, seed=recipe.seed, label_names=label_names)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        task: Task = resolve_name(recipe.task.task_class)(recipe.task, backbone, run)
    twin = merge_low_rank(deepcopy(task.published)).eval().requires_grad_(False)
    if recipe.scale.checkpointing:
        backbone.set_grad_checkpointing()
    if recipe.scale.compile:
        for module in (task.network, *task.frozen.values()):
            for block in blocks_of(module):
                block.compile()
    transform = cast(Transform, create_transform(**config))
    return Parts(
        arch=arch,
        data=data,
        held_out=held_out,
        eval_images=held_out or as_image_source(data),
        knn_images=as_image_source(data) if held_out and data.has_labels else None,
        loader=loader,
        transform=transform if in_chans == 3 else Gray(transform=transform),
        mean=config["mean"],
        std=config["std"],
        span=span,
        task=task,
        twin=twin,
        sources=sources_of(recipe),
    )


def vit_of(published: nn.Module) -> VisionTransformer:
    """The ViT in a task's published module."""
    return cast(VisionTransformer, getattr(published, "backbone", published))
