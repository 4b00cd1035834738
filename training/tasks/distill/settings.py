"""Settings of distillation."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill:
    """A student with registers learns the patch tokens of a frozen teacher, after the final norm.

    Attributes:
        teacher: Bundle's folder, ``hf-hub:org/name``, or an architecture with a tag.
        cosine_weight: Of one minus the mean cosine. Source: PH-Reg, utils/loss.py.
        mse_weight: Of the mean squared difference. Source: the same, whose `mse_loss` is a fifth of it.
        class_weight: Of one minus the cosine of the class tokens.
    """

    teacher: str
    cosine_weight: float = 1.0
    mse_weight: float = 0.2
    class_weight: float = 0.0
