"""Settings of classification."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from vitreg_hub.objectives import SUPERVISED
from vitreg_hub.training.tasks.ranges import BelowOne, NotNegative, Share
from vitreg_hub.training.tasks.settings import TaskSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised(TaskSettings):
    """Classification, as in DeiT-III.

    Attributes:
        loss: "bce" decides yes or no for every class, where targets above 0 mean yes; "ce" is the cross-entropy.
        smoothing: Label smoothing. With "bce" it would turn every class into a yes, so it must be 0.
        mixup: Alpha of mixup; 0: none.
        cutmix: Alpha of cutmix; 0: none.
        mix_probability: Share of the batches that are mixed.
        switch_probability: Share of those with cutmix, if both are on.
        ema: Decay per step of the averaged weights; None: there are none.
        ema_warmup: Whether that decay grows from 0 as timm's does, by 1 - (steps + 1) ** (-2 / 3), up to `ema`. If not,
            a run must be long enough to forget its start.
        publish: Whether the averaged weights are evaluated and published, where there are some, or the raw ones; the
            others are scored besides.
    """

    objective = SUPERVISED
    task_class = "vitreg_hub.training.tasks.supervised.task:SupervisedTask"
    needs = ("labels",)
    classifies = True

    loss: Literal["bce", "ce"] = "bce"
    smoothing: BelowOne = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mix_probability: Share = 1.0
    switch_probability: Share = 0.5
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    ema_warmup: bool = True
    publish: Literal["averaged", "raw"] = "averaged"

    def problems(self, *, batch_size: int) -> Iterator[str]:
        """Yield impossible targets, and images without a partner."""
        if self.loss == "bce" and self.smoothing:
            yield (
                f"task.smoothing is {self.smoothing} under the loss bce, whose targets above 0 all become a yes: set "
                "it to 0, or task.loss to ce."
            )
        if (self.mixup or self.cutmix) and batch_size % 2:
            yield f"batch_size is {batch_size}, but mixup and cutmix take images in pairs: give an even one."
