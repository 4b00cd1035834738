"""Mixup and cutmix of a batch, by timm, alike in every process of a step."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.distributed.randomness import seeded
from vitreg_hub.training.tasks.supervised.settings import Supervised


def mix(
    images: Tensor, labels: Tensor, *, settings: Supervised, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with its mirror image in the batch: the first with the last, the second with the one before it.

    Whether it is mixup or cutmix, the share and the rectangle are one draw per step, so that processes that hold such
    pairs each do what one process would do to all of them.

    Args:
        images: [b, 3, H, W]. They stay as they are.
        labels: Classes [b].
        settings: What is mixed, how often, and the smoothing.
        num_classes: Number of classes.
        seed: Of the run.
        step: Number of the step.

    Returns:
        The mixed images [b, 3, H, W], and their targets [b, num_classes], whose rows sum to 1.

    Raises:
        RecipeError: A number of images that makes no pairs.
    """
    if not (settings.mixup or settings.cutmix):
        return images, mixup_target(labels, num_classes, smoothing=settings.smoothing)
    if len(images) % 2:
        raise RecipeError(
            f"a process gets {len(images)} images at a time, but mixup and cutmix take them in pairs: choose a "
            "batch_size that is an even multiple of processes times scale.accumulate."
        )
    mixup = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.switch_probability,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )
    with seeded(seed, step):
        return mixup(images.clone(), labels)  # timm writes into what it is given
