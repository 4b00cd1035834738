"""Mixup and cutmix of a batch with timm, alike in every process of a step."""

from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.distributed.randomness import seeded
from vitreg_hub.training.tasks.supervised.settings import Supervised


def mix(
    images: Tensor, labels: Tensor, *, settings: Supervised, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with its opposite in the batch: the first with the last, the second with the one before the last.

    The choice of mixup or cutmix, the share and the rectangle are drawn once per step, so that processes which hold
    such pairs do the same as one process with all of them.

    Args:
        images: Images [b, 3, H, W], which are not changed.
        labels: Classes [b].
        settings: What is mixed, how often, and the smoothing.
        num_classes: Number of classes.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        The mixed images [b, 3, H, W], and their targets [b, num_classes], whose rows sum to 1.

    Raises:
        RecipeError: The number of images is odd.
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
        return mixup(images.clone(), labels)  # because timm changes its input
