"""All recipes by name: the published runs, and small ones on embedded data. Does not import torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from vitreg_hub.training.recipes import published
from vitreg_hub.training.recipes.published import arch_name
from vitreg_hub.training.recipes.settings import (
    CropAugment,
    DataSettings,
    ModelSettings,
    MultiCrop,
    OptimSettings,
    Recipe,
    WatchSettings,
)
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2, Head
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.supervised.settings import Supervised


def supervised_digits(registers: int = 4) -> Recipe:
    """A nano ViT learns to read scikit-learn's digits; two minutes on two cores.

    A patch of 4 pixels is 2 x 2 of the digits' own 8 x 8.
    """
    return Recipe(
        name="supervised_digits",
        model=ModelSettings(arch=arch_name("dinov2", "nano", registers), img_size=16, layer_scale=0.1),
        task=Supervised(loss="ce", smoothing=0.1, mixup=0.2, ema=0.98),
        data=DataSettings(train="digits"),
        augment=CropAugment(scale=(0.6, 1.0), ratio=(0.8, 1.25), hflip=0.0),  # digits have no mirror images
        optim=OptimSettings(opt="nadamuon", lr=4e-3, warmup_epochs=1, weight_decay=0.05),
        watch=WatchSettings(eval_every=132, save_every=132),
        batch_size=64,
        epochs=24,
    )


def dinov2_digits(registers: int = 4) -> Recipe:
    """DINOv2, scaled down, on scikit-learn's digits, without labels; under two minutes on two cores.

    In so few steps the teacher must follow the student quickly. As long as class tokens differ little, targets must be
    sharp and the bottleneck narrow: otherwise all targets become uniform, which is learnt at once and teaches nothing.
    """
    return Recipe(
        name="dinov2_digits",
        model=ModelSettings(arch=arch_name("dinov2", "nano", registers), img_size=16, layer_scale=0.1),
        task=DinoV2(
            dino_head=Head(prototypes=256, bottleneck=32, hidden=128, layers=3),
            teacher_temperature=(0.02, 0.02),
            momentum=(0.96, 1.0),
            freeze_last_layer_epochs=0.5,
        ),
        data=DataSettings(train="digits"),
        augment=MultiCrop(
            local_size=8,
            num_local=2,
            global_scale=(0.5, 1.0),
            local_scale=(0.15, 0.5),
            ratio=(0.9, 1.1),
            hflip=0.0,
            color_jitter=0.0,
            gray=0.0,
            blur=(0.0, 0.0, 0.0),
            solarize=0.0,
        ),
        optim=OptimSettings(
            opt="adamw",
            lr=1e-3,
            warmup_epochs=1,
            weight_decay=0.04,
            decay_rule="dinov2",
            clip=3.0,
            clip_per_module=True,
        ),
        watch=WatchSettings(eval_every=44, save_every=88),
        batch_size=64,
        epochs=7,
    )


def contrastive_scenes(registers: int = 4) -> Recipe:
    """OpenCLIP, scaled down, on rendered scenes with captions; under two minutes on two cores."""
    return Recipe(
        name="contrastive_scenes",
        model=ModelSettings(arch=arch_name("dinov2", "nano", registers), patch_size=8, layer_scale=0.1),
        task=Contrastive(
            text_width=128,
            text_heads=4,
            text_layers=2,
            context_length=16,
            embed_dim=64,
            templates=("a {}", "a picture of a {}", "a drawing with a {} in the middle"),
        ),
        data=DataSettings(train="scenes"),
        augment=CropAugment(scale=(0.9, 1.0), ratio=(0.9, 1.1), hflip=0.0),  # captions tell left from right
        optim=OptimSettings(
            opt="adamw",
            lr=2e-3,
            warmup_epochs=0.5,
            weight_decay=0.2,
            decay_rule="openclip",
            betas=(0.9, 0.98),
            eps=1e-6,
        ),
        watch=WatchSettings(eval_every=63, save_every=126),
        batch_size=64,
        epochs=4,
    )


def distill_digits(registers: int = 4) -> Recipe:
    """A nano ViT from scratch learns the patch tokens of the package's digits model; under two minutes on two cores."""
    supervised = supervised_digits(registers)
    return replace(
        supervised,
        name="distill_digits",
        model=replace(supervised.model, img_size=None),  # the teacher's, 32
        task=Distill(teacher="vit_nano_reg0.digits"),
        watch=WatchSettings(eval_every=22, save_every=44),
        epochs=4,
    )


def finetune(registers: int | None = None) -> Recipe:
    """Your own images in class folders, from any model of yours or the Hub: give --model.start and --data.train.

    Architecture, size, patch and preprocessing are the start's (registers too, unless they are given), and so is the
    head if it has the same classes. A fifth of each class is held out (`data.held_out`), unless there is `data.test`.
    The rate falls by a quarter from each block to the one below, and the run ends when five epochs were not better.
    """
    return Recipe(
        name="finetune",
        model=ModelSettings(arch=None, registers=registers, start_required=True),
        task=Supervised(loss="ce", smoothing=0.1),
        data=DataSettings(train="pictures", held_out=0.2),
        augment=CropAugment(scale=(0.5, 1.0), hflip=0.5),
        optim=OptimSettings(lr=3e-4, warmup_epochs=1, weight_decay=0.05, layer_decay=0.75, clip=1.0),
        watch=WatchSettings(eval_every=None, patience=5, save_every=None),
        batch_size=16,
        epochs=20,
    )


RECIPES: Mapping[str, Callable[..., Recipe]] = MappingProxyType(
    {
        recipe.__name__: recipe
        for recipe in (
            *(supervised_digits, dinov2_digits, contrastive_scenes, distill_digits, finetune),
            *published.RECIPES,
        )
    }
)
"""Recipes by name. Each takes `registers`, one of `REGISTER_COUNTS`, or None for `finetune`, which has its start's."""

LICENSES: Mapping[str, str] = MappingProxyType(
    {recipe.__name__: "apache-2.0" for recipe in (supervised_digits, dinov2_digits, contrastive_scenes)}
)
"""Licenses of the weights of recipes that use nothing but images which this package contains or draws."""


def default_license(recipe: Recipe) -> str | None:
    """The license of a named recipe's weights, as long as its images, start and teacher are unchanged.

    As a setting of the recipe, it would survive a change of those.
    """
    if recipe.name not in LICENSES:
        return None
    return LICENSES[recipe.name] if _sources(recipe) == _sources(RECIPES[recipe.name]()) else None


def _sources(recipe: Recipe) -> tuple[str | None, ...]:
    return recipe.data.train, recipe.model.start, getattr(recipe.task, "teacher", None)
