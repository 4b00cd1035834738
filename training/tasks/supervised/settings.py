"""Settings of classification."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vitreg_hub.objectives import SUPERVISED
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
        ema: Decay per step of the averaged weights, which are then the published ones; None: there are none.
    """

    objective = SUPERVISED
    task_class = "vitreg_hub.training.tasks.supervised.task:SupervisedTask"
    needs = ("labels",)
    classifies = True

    loss: Literal["bce", "ce"] = "bce"
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5
    ema: float | None = None

    def problems(self, *, batch_size: int) -> Iterator[str]:
        """Yield impossible targets, images without a partner, and a decay out of range."""
        if self.loss == "bce" and self.smoothing:
            yield (
                f"task.smoothing is {self.smoothing} under the loss bce, whose targets above 0 all become a yes: set "
                "it to 0, or task.loss to ce."
            )
        if (self.mixup or self.cutmix) and batch_size % 2:
            yield f"batch_size is {batch_size}, but mixup and cutmix take images in pairs: give an even one."
        if self.ema is not None and not 0 < self.ema < 1:
            yield f"task.ema is {self.ema}, give a decay between 0 and 1, or null for none."
