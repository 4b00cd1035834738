"""Schedules over a run, with one number per step: learning rate, weight decay, the teacher's momentum, temperature."""

import math
from dataclasses import dataclass

from vitreg_hub.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineSchedule:
    """Zeros, then a linear warm-up, then half a cosine.

    The warm-up includes both ends: its last step has `base`, and so has the first one after it. The cosine does not
    quite reach `final`, which all steps from `total` on have.

    Attributes:
        base: Value after the warm-up.
        final: Value of the steps from `total` on.
        total: Steps of all three parts together.
        warmup: Steps of the warm-up.
        warmup_start: Value of its first step.
        freeze: Steps of 0 before everything else.

    Source: dinov2/utils/utils.py CosineScheduler, dinov2/train/train.py build_schedulers (Apache-2.0).
    """

    base: float
    final: float
    total: int
    warmup: int = 0
    warmup_start: float = 0.0
    freeze: int = 0

    def __post_init__(self) -> None:
        if self.freeze + self.warmup > self.total:
            raise RecipeError(
                f"a schedule of {self.total} steps cannot begin with {self.freeze + self.warmup} steps of freezing and "
                "warm-up: train longer or warm up for a shorter time."
            )

    def __call__(self, step: int) -> float:
        """Value at a step, counted from 0."""
        if step >= self.total:
            return self.final
        if step < self.freeze:
            return 0.0
        step -= self.freeze
        last = self.warmup - 1
        if step < last:
            return self.warmup_start + step * ((self.base - self.warmup_start) / last)
        if step == last:
            return self.base if step else self.warmup_start
        done = (step - self.warmup) / (self.total - self.freeze - self.warmup)
        return self.final + 0.5 * (self.base - self.final) * (1 + math.cos(math.pi * done))


def linear_then_constant(value: float, *, warmup: int, start: float) -> CosineSchedule:
    """From `start` to `value` in `warmup` steps, including both ends, then constant: the teacher's temperature.

    Source: dinov2/train/train.py build_schedulers (Apache-2.0).
    """
    return CosineSchedule(base=value, final=value, total=warmup, warmup=warmup, warmup_start=start)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The length of an epoch and of a whole run in steps."""

    epoch_steps: int
    total_steps: int

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs."""
        return round(epochs * self.epoch_steps)
