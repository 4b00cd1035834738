"""Published runs with registers added. Does not import torch.

Every function takes the number of registers and returns the whole run. Numbers without a source of their own are in the
files that the docstring names. Where upstream trains in fp16 with gradient scaling, these use bf16, which has the range
of fp32 and needs none. Data on the Hub is streamed and not kept.
"""

from collections.abc import Callable
from dataclasses import replace

from vitreg_hub.arch import REGISTER_COUNTS, row
from vitreg_hub.errors import RecipeError
from vitreg_hub.training.recipes.settings import (
    CropAugment,
    DataSettings,
    ModelSettings,
    MultiCrop,
    OptimSettings,
    Recipe,
    ScaleSettings,
    ThreeAugment,
    WatchSettings,
)
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2, Head
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.supervised.settings import Supervised

IMAGENET_1K = DataSettings(
    train="timm/imagenet-1k-wds:train",
    test="timm/imagenet-1k-wds:validation",
    num_classes=1000,
    streaming=True,
    stream_images=1_281_167,  # dinov2/data/datasets/image_net.py, `_Split.length`
    num_workers=10,  # deit/main.py `--num_workers`, dinov2/configs/ssl_default_config.yaml `num_workers`
)
EPOCH_IMAGENET_1K = 1_281_167 // 2048
"""Steps of 2048 images for one pass over ImageNet-1k: 625."""


def arch_name(family: str, size: str, registers: int) -> str:
    """Name of an architecture of `vitreg list`.

    Raises:
        RecipeError: There is none with this number of registers.
    """
    if registers not in REGISTER_COUNTS:
        raise RecipeError(
            f"no architecture of `vitreg list` has {registers} registers: give one of "
            f"{', '.join(map(str, REGISTER_COUNTS))}."
        )
    return row(family, size, registers).name


def _deit3(size: str, registers: int, *, img_size: int, lr: float, drop_path: float) -> Recipe:
    """What the sizes of DeiT-III share: 800 epochs of ImageNet-1k in batches of 2048.

    Source: deit/README_revenge.md (the commands; `--unscale-lr` takes the rate as it is), deit/main.py (min_lr, EMA
    without a warm-up, repeats), deit/models_v2.py (`init_scale`). Upstream also keeps averaged weights but scores and
    publishes the last ones: `--task.publish raw` does that; a much shorter run needs `--task.ema_warmup true`. An epoch
    is as long as the data: a third of the images, three times each. The command of ViT-S has a space missing
    (`--repeated-aug--bce-loss`) and is read as if it were there. Rates change with each step, and the cosine begins
    after the warm-up; upstream's change with each epoch and count from the first one.
    """
    return Recipe(
        name=f"deit3_{size}",
        model=ModelSettings(
            arch=arch_name("deit3", size, registers), img_size=img_size, drop_path=drop_path, layer_scale=1e-4
        ),
        task=Supervised(
            loss="bce",
            mixup=0.8,
            cutmix=1.0,
            mix_probability=1.0,
            switch_probability=0.5,
            smoothing=0.0,
            ema=0.99996,
            ema_warmup=False,
        ),
        data=IMAGENET_1K,
        augment=ThreeAugment(crop="rrc", color_jitter=0.3, hflip=0.5, repeats=3),
        optim=OptimSettings(opt="lamb", lr=lr, min_lr=1e-5, warmup_epochs=5, warmup_lr=1e-6, weight_decay=0.05),
        scale=ScaleSettings(precision="bf16"),
        watch=WatchSettings(eval_every=10 * EPOCH_IMAGENET_1K, save_every=EPOCH_IMAGENET_1K),
        batch_size=2048,
        epochs=800,
    )


def deit3_small(registers: int = 4) -> Recipe:
    """DeiT-III ViT-S/16 on ImageNet-1k at 224 pixels."""
    return _deit3("small", registers, img_size=224, lr=4e-3, drop_path=0.05)


def deit3_base(registers: int = 4) -> Recipe:
    """DeiT-III ViT-B/16 on ImageNet-1k at 192 pixels."""
    return _deit3("base", registers, img_size=192, lr=3e-3, drop_path=0.2)


def deit3_large(registers: int = 4) -> Recipe:
    """DeiT-III ViT-L/16 on ImageNet-1k at 192 pixels."""
    return _deit3("large", registers, img_size=192, lr=3e-3, drop_path=0.45)


def deit3_huge(registers: int = 4) -> Recipe:
    """DeiT-III ViT-H/14 on ImageNet-1k at 154 pixels.

    Upstream crops images to 160 pixels, of which its patch embedding silently drops the last six rows and columns,
    leaving 11 patches of 14 pixels a side. Here the images have 154 pixels, all of which the network sees.
    """
    return _deit3("huge", registers, img_size=154, lr=3e-3, drop_path=0.6)


def _deit3_finetune(start: Recipe, *, img_size: int, drop_path: float) -> Recipe:
    """The second stage of DeiT-III, at a higher resolution: 20 epochs in batches of 512 (`--model.start` is needed).

    min_lr is upstream's default and equals the rate, which is therefore constant after the warm-up. There are no
    averaged weights: after 50,000 steps they would still hold an eighth of the start. With RandAugment, timm leaves
    colour jitter out.
    Source: deit/README_revenge.md, finetuning commands; deit/main.py.
    """
    return replace(
        start,
        name=f"{start.name}_finetune_{img_size}",
        model=replace(start.model, start_required=True, img_size=img_size, drop_path=drop_path, layer_scale=None),
        task=replace(start.task, loss="ce", smoothing=0.1, ema=None),
        augment=CropAugment(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1"),
        optim=replace(start.optim, opt="adamw", lr=1e-5, weight_decay=0.1),
        batch_size=512,
        epochs=20,
    )


def _second_stage(first: Callable[[int], Recipe], img_size: int, drop_path: float) -> Callable[..., Recipe]:
    def recipe(registers: int = 4) -> Recipe:
        return _deit3_finetune(first(registers), img_size=img_size, drop_path=drop_path)

    recipe.__name__ = f"{first.__name__}_finetune_{img_size}"
    recipe.__doc__ = f"Second stage of {first.__name__}, at {img_size} pixels; give --model.start."
    return recipe


def dinov2_vitl16_short(registers: int = 4) -> Recipe:
    """DINOv2 ViT-L/16 on ImageNet-1k, 125,000 steps.

    Blur follows the released models, not what the code seems to say (see MultiCrop). KoLeo looks for neighbours in the
    global batch, upstream in the 64 images of a process. The run ends after exactly 100 epochs; upstream's check of the
    last step is off by one. Source: dinov2/configs/train/vitl16_short.yaml, ssl_default_config.yaml (everything else,
    also the defaults of DinoV2 and MultiCrop); dinov2/README.md (4 nodes: 32 processes of 64 images).
    """
    return Recipe(
        name="dinov2_vitl16_short",
        model=ModelSettings(arch=arch_name("dinov2", "large", registers), img_size=224, patch_size=16, drop_path=0.3),
        task=DinoV2(centering="running_mean"),
        data=IMAGENET_1K,
        augment=MultiCrop(),
        optim=OptimSettings(
            opt="adamw",
            lr=4e-3,
            lr_batch=1024,
            min_lr=1e-6,
            warmup_epochs=10,
            weight_decay=0.04,
            weight_decay_end=0.4,
            decay_rule="dinov2",
            layer_decay=0.9,
            patch_embed_lr=0.2,
            clip=3.0,
            clip_per_module=True,
        ),
        scale=ScaleSettings(precision="bf16"),
        watch=WatchSettings(eval_every=12_500, save_every=1250),
        batch_size=2048,
        epochs=100,
        epoch_steps=1250,
    )


def dinov2_vitl14(registers: int = 4) -> Recipe:
    """DINOv2 ViT-L/14 on ImageNet-22k, 625,000 steps.

    Upstream trains this size with a SwiGLU MLP of width 2736, for which there is no row. The released ViT-L/14 has the
    plain MLP of `vit_large_reg*`, and so has this one. Blur, KoLeo and the last step are as in `dinov2_vitl16_short`.
    Source: dinov2/configs/train/vitl14.yaml; dinov2/README.md (12 nodes: 96 processes of 32 images).
    """
    short = dinov2_vitl16_short(registers)
    return replace(
        short,
        name="dinov2_vitl14",
        model=replace(short.model, patch_size=14, drop_path=0.4),
        task=replace(
            short.task,
            dino_head=Head(prototypes=131072, bottleneck=384),
            ibot_head=Head(prototypes=131072, bottleneck=256),  # the yaml leaves 256 as it is
            centering="sinkhorn_knopp",
            momentum=(0.994, 1.0),
        ),
        data=replace(
            IMAGENET_1K,
            train="timm/imagenet-22k-wds:train",
            test="timm/imagenet-22k-wds:validation",
            stream_images=None,
        ),
        augment=replace(short.augment, local_size=98),
        optim=replace(short.optim, lr=2e-4, warmup_epochs=80, weight_decay_end=0.2, layer_decay=1.0),
        batch_size=3072,
        epochs=500,
    )


def dinov2_vitg14(registers: int = 4) -> Recipe:
    """DINOv2 ViT-g/14 on ImageNet-22k, 625,000 steps.

    Upstream gives 12 images per process but not the number of processes, so the global batch is that of ViT-L/14. The
    released model's data, LVD-142M, are not public; the yaml names ImageNet-22k. Source:
    dinov2/configs/train/vitg14.yaml.
    """
    large = dinov2_vitl14(registers)
    return replace(
        large, name="dinov2_vitg14", model=replace(large.model, arch=arch_name("dinov2", "giant", registers))
    )


def openclip_base(registers: int = 4) -> Recipe:
    """OpenCLIP ViT-B/16 on LAION-400M, 32 epochs; give --data.train if the shards are elsewhere.

    Like the other tokens and the positions, registers have no weight decay. The warm-up is 2000 steps, given in epochs.
    Upstream scores with 80 templates, which `--task.templates` takes. Source: open_clip_train/params.py (rate, betas,
    eps, decay, epochs, workers, precision); docs/PRETRAINED.md (176 processes of 192 images);
    docs/script_examples/stability_example.sh (warm-up); hf.co/laion/scaling-laws-openclip (number of images).
    """
    batch_size, images = 33_792, 407_332_084
    return Recipe(
        name="openclip_base",
        model=ModelSettings(arch=arch_name("clip", "base", registers), img_size=224),
        task=Contrastive(
            text_width=512, text_heads=8, text_layers=12, context_length=77, embed_dim=512, local_loss=True
        ),
        data=DataSettings(
            train="laion400m/{00000..41455}.tar",
            test="timm/imagenet-1k-wds:validation",
            streaming=True,
            stream_images=images,
            num_workers=4,
        ),
        augment=CropAugment(scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.0),
        optim=OptimSettings(
            opt="adamw",
            lr=5e-4,
            warmup_epochs=2000 * batch_size / images,
            warmup_lr=5e-4 / 2000,  # open_clip_train/scheduler.py begins with one step's worth
            weight_decay=0.2,
            decay_rule="openclip",
            betas=(0.9, 0.98),
            eps=1e-6,
        ),
        scale=ScaleSettings(precision="bf16"),
        watch=WatchSettings(eval_every=12_000, save_every=2000),
        batch_size=batch_size,
        epochs=32,
    )


def distill(registers: int = 4) -> Recipe:
    """DINOv2 ViT-B/14 with new registers learns its own patch tokens again; give --data.train.

    With PH-Reg's numbers where they apply: rate, its floor, decay, epochs, loss, 518 pixels, square crops. Different
    from PH-Reg are its 16 registers (`--registers 16`), the exponential schedule (a cosine here), decay of all
    parameters, 8 images in each of an unknown number of processes (64 in all here), the choice of trainable layers (all
    here; `--model.trainable registers` for the fewest), and the denoised teacher. Source: PH-Reg, distill_main.py,
    utils/loss.py.
    """
    teacher = "hf-hub:timm/vit_base_patch14_dinov2.lvd142m"
    return Recipe(
        name="distill",
        model=ModelSettings(arch=arch_name("dinov2", "base", registers), start_required=True, img_size=518),
        task=Distill(teacher=teacher, cosine_weight=1.0, mse_weight=0.2),
        data=DataSettings(train="flickr30k", num_workers=10),
        augment=CropAugment(scale=(0.5, 1.0), ratio=(1.0, 1.0), hflip=0.0),
        optim=OptimSettings(opt="adamw", lr=1e-4, min_lr=5e-6, weight_decay=1e-2),
        scale=ScaleSettings(precision="bf16"),
        watch=WatchSettings(eval_every=2000, save_every=500),
        batch_size=64,
        epochs=100,
    )


RECIPES: tuple[Callable[..., Recipe], ...] = (
    *(deit3_small, deit3_base, deit3_large, deit3_huge),
    *(_second_stage(deit3_base, 224, 0.2), _second_stage(deit3_large, 224, 0.45), _second_stage(deit3_huge, 224, 0.55)),
    *(_second_stage(deit3_small, 384, 0.0), _second_stage(deit3_base, 384, 0.15), _second_stage(deit3_large, 384, 0.4)),
    *(dinov2_vitl16_short, dinov2_vitl14, dinov2_vitg14),
    *(openclip_base, distill),
)
