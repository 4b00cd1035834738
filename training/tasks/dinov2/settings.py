"""Settings of self-distillation."""

from dataclasses import dataclass, field
from typing import Literal

from vitreg_hub.objectives import DINOV2
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
        ibot_head: Head of the patches; None: they share `dino_head`.
        centering: How the teacher's outputs are kept from collapsing.
        sinkhorn_iterations: Passes of Sinkhorn-Knopp.
        center_momentum: Momentum of the running mean.
        student_temperature: Temperature of the student's softmax.
        teacher_temperature: Start and end of the teacher's temperature, which changes linearly.
        teacher_temperature_epochs: Epochs after which it ends.
        momentum: Start and end of the teacher's momentum (cosine over the run).
        dino_weight: Weight of the DINO loss.
        ibot_weight: Weight of the iBOT loss.
        koleo_weight: Weight of the KoLeo loss.
        koleo_global: Whether KoLeo looks for nearest neighbours in the global batch; upstream looks in one process.
        mask_probability: Share of the global crops that are masked.
        mask_ratio: Range of the masked share of such a crop's patches.
        freeze_last_layer_epochs: Epochs in which the heads' last layers keep their weights.
        heads_first_epochs: Epochs in which only the heads are trained and the backbone keeps its weights. Otherwise new
            heads on a trained backbone would destroy its features (facebookresearch/dinov2#204).
        heads: Checkpoint (``run/checkpoints/step_...``) to load heads from, which then need no epochs of their own.
    """

    objective = DINOV2
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
