"""Settings of classification."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervised:
    """Classification, as in DeiT-III.

    Attributes:
        loss: "bce" takes every class as a yes or no, with targets above 0 as yes; "ce" is the cross-entropy.
        smoothing: Label smoothing. Under "bce" it would make every class a yes, so it must be 0.
        mixup: Alpha of mixup; 0: none.
        cutmix: Alpha of cutmix; 0: none.
        mix_probability: Share of the batches that are mixed.
        switch_probability: Share of those that take cutmix, where both are on.
        ema: Decay per step of the averaged weights, which are what is published; None: none are kept.
    """

    loss: Literal["bce", "ce"] = "bce"
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    switch_probability: float = 0.5
    ema: float | None = None
