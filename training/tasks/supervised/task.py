"""Classification as DeiT-III trains it: mixed images, binary cross-entropy, averaged weights."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import cast

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.errors import DataError, RecipeError
from vitreg_hub.training.distributed.parallel import average_into
from vitreg_hub.training.distributed.randomness import seeded
from vitreg_hub.training.tasks.base import Batch, RunFacts, Scorer, StepOutput, Task, correct
from vitreg_hub.training.tasks.supervised.settings import Supervised

logger = logging.getLogger(__name__)

MOST_OF_START = 0.1
"""Largest share of the start in the averaged weights of a finished run."""


class SupervisedNetwork(nn.Module):
    """The ViT with its classification head."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        return self.backbone(images)


class SupervisedTask(Task[SupervisedNetwork]):
    """Images and their classes. The averaged weights are published, if there are any."""

    def __init__(self, settings: Supervised, backbone: VisionTransformer, run: RunFacts) -> None:
        self.settings, self.seed = settings, run.seed
        self.network = SupervisedNetwork(backbone)
        self.frozen = {}
        if settings.ema is not None:
            require_long_enough(settings, run.span.total_steps)
            self.frozen["ema"] = deepcopy(self.network).eval().requires_grad_(False)

    def training_step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Cross-entropy with the targets of mixed images, of every class separately or of all together.

        Raises:
            DataError: The batch has no labels.
        """
        if batch.labels is None:
            raise DataError("supervised training needs labels: give data.label_column, or data that have some.")
        images, targets = mix(
            batch.crops[0],
            batch.labels,
            settings=self.settings,
            num_classes=self.network.backbone.num_classes,
            seed=self.seed,
            step=batch.step,
        )
        loss = classification_loss(network(images), targets, kind=self.settings.loss)
        return StepOutput(loss=loss, metrics={})

    def after_step(self, step: int) -> None:
        """Update the averaged weights."""
        if self.settings.ema is not None:
            average_into(self.frozen["ema"], self.network, decay_after(self.settings, step))

    @property
    def published(self) -> nn.Module:
        """The averaged network, if there is one and the settings do not ask for the raw one, or the network."""
        return self.network if self.settings.publish == "raw" else self.frozen.get("ema", self.network)

    @property
    def compared(self) -> Mapping[str, nn.Module]:
        """The other one of the raw and the averaged network."""
        if self.settings.ema is None:
            return {}
        return {"averaged": self.frozen["ema"]} if self.settings.publish == "raw" else {"raw": self.network}

    def scorer(self, model: nn.Module) -> Scorer:
        """Top-1 accuracy."""

        def score(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"accuracy": correct(model(images), labels)}

        return score


def decay_after(settings: Supervised, step: int) -> float:
    """Decay of the averaged weights after a step, from 0.

    Source: timm/utils/model_ema.py, `ModelEmaV3.get_decay`; without a warm-up `ModelEma.update`, which deit uses.
    """
    decay = cast(float, settings.ema)
    return min(decay, 1 - (step + 1) ** (-2 / 3)) if settings.ema_warmup else decay


def require_long_enough(settings: Supervised, steps: int) -> None:
    """Say, or refuse, that a run is too short for the decay of its averaged weights.

    Raises:
        RecipeError: Too much of the start would be left in them at the end.
    """
    decay = cast(float, settings.ema)
    left = decay**steps
    if left <= MOST_OF_START:
        return
    told = f"task.ema {decay} is for longer runs than {steps} steps, where it would leave {left:.0%} of the start"
    if not settings.ema_warmup:
        raise RecipeError(f"{told}: set task.ema_warmup to true, take a smaller decay, or null for none.")
    logger.warning("%s; warmed up, it ends at %.4g", told, decay_after(settings, steps - 1))


def classification_loss(logits: Tensor, targets: Tensor, *, kind: str) -> Tensor:
    """Mean cross-entropy over images of logits and shares of the classes [B, classes].

    With "bce" for every class separately, with all targets above 0 as 1 (mean over classes too), else "ce".

    Source: deit/engine.py (`if args.bce_loss: targets = targets.gt(0.0).type(targets.dtype)`) and main.py.
    """
    logits = logits.float()
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets.gt(0).to(logits.dtype))
    return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()


def mix(
    images: Tensor, labels: Tensor, *, settings: Supervised, num_classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with its opposite in the batch: the first with the last, the second with the one before the last.

    The choice of mixup or cutmix, the share and the rectangle are drawn once per step, so that processes which hold
    such pairs do the same as one process with all of them. The images [b, 3, H, W] and labels [b] are not changed.

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
