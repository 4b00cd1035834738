"""Settings of self-distillation."""

from dataclasses import dataclass, field
from typing import Literal

from vitreg_hub.objectives import KNN_ACCURACY, Objective
from vitreg_hub.training.tasks.settings import TaskSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A projection head of DINO.

    Attributes:
        prototypes: Width of its output.
        bottleneck: Width before the last layer.
        hidden: Width of the layers before that.
        layers: Number of layers before the last one.
    """

    prototypes: int = 65536
    bottleneck: int = 256
    hidden: int = 2048
    layers: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class DinoV2(TaskSettings):
    """Self-distillation with DINO, iBOT and KoLeo losses. Registers take no loss.

    Attributes:
        dino_head: Head of the class token.
        ibot_head: Head of the patches; None: they share the first one.
        centering: How the teacher's outputs are kept from collapsing.
        sinkhorn_iterations: Of Sinkhorn-Knopp.
        center_momentum: Of the running mean.
        student_temperature: Of the student's softmax.
        teacher_temperature: Start and end of the teacher's, reached after `teacher_temperature_epochs`, linearly.
        teacher_temperature_epochs: Epochs.
        momentum: Start and end of the teacher's momentum (cosine over the run).
        dino_weight: Of the DINO loss.
        ibot_weight: Of the iBOT loss.
        koleo_weight: Of the KoLeo loss.
        koleo_global: Whether nearest neighbours are sought in the global batch; upstream seeks within one process.
        mask_probability: Share of the global crops that are masked.
        mask_ratio: Range of the masked share of such a crop's patches.
        freeze_last_layer_epochs: Epochs in which the heads' last layers keep their weights.
        heads_first_epochs: Epochs in which the heads alone are trained, the teacher's follow, and the backbone keeps
            its weights. New heads on a trained backbone would else destroy its features (facebookresearch/dinov2#204).
        heads: Checkpoint (``run/checkpoints/step_...``) whose heads are taken; they need no epochs of their own then.
    """

    objective = Objective(words="self-distillation as in DINOv2", score=KNN_ACCURACY)
    task_class = "vitreg_hub.training.tasks.dinov2.task:DinoV2Task"
    multi_crop = True

    dino_head: Head = field(default_factory=Head)
    ibot_head: Head | None = None
    centering: Literal["sinkhorn_knopp", "running_mean"] = "sinkhorn_knopp"
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_temperature_epochs: float = 30
    momentum: tuple[float, float] = (0.992, 1.0)
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_global: bool = True
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    freeze_last_layer_epochs: float = 1
    heads_first_epochs: float = 0
    heads: str | None = None
