"""Settings of distillation."""

from collections.abc import Mapping
from dataclasses import dataclass

from vitreg_hub.objectives import DISTILL
from vitreg_hub.training.tasks.settings import TaskSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Distill(TaskSettings):
    """A student with registers learns the patch tokens of a frozen teacher, after the final norm.

    Attributes:
        teacher: A bundle's folder, ``hf-hub:org/name``, or an architecture with a tag.
        cosine_weight: Weight of one minus the mean cosine. Source: PH-Reg, utils/loss.py.
        mse_weight: Weight of the mean squared difference. Source: the same, whose `mse_loss` is a fifth of it.
        class_weight: Weight of one minus the cosine of the class tokens.
    """

    objective = DISTILL
    task_class = "vitreg_hub.training.tasks.distill.task:DistillTask"

    teacher: str
    cosine_weight: float = 1.0
    mse_weight: float = 0.2
    class_weight: float = 0.0

    def teachers(self) -> Mapping[str, str]:
        """The one teacher."""
        return {"task.teacher": self.teacher}
