"""Settings of contrastive image-text training."""

from collections.abc import Iterator
from dataclasses import dataclass

from vitreg_hub.objectives import CONTRASTIVE
from vitreg_hub.training.tasks.settings import TaskSettings

MAX_LOGIT_SCALE = 100
"""Source: open_clip_train/train.py, "clamp to 4.6052 = ln(100), as in the original paper"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive(TaskSettings):
    """Images against captions, as in OpenCLIP.

    Attributes:
        text_width: Width of the text tower.
        text_heads: Attention heads of the text tower.
        text_layers: Blocks of the text tower.
        context_length: Tokens of a caption.
        embed_dim: Width of the space that images and texts share.
        logit_scale: Scale of the similarities at the start.
        local_loss: Whether each process computes the loss of its own rows only, which saves memory.
        templates: Sentences around a class's name for zero-shot classification, with {} in its place.
    """

    objective = CONTRASTIVE
    task_class = "vitreg_hub.training.tasks.contrastive.task:ContrastiveTask"
    needs = ("texts",)
    libraries = ("open_clip_torch",)

    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    context_length: int = 77
    embed_dim: int = 512
    logit_scale: float = 1 / 0.07
    local_loss: bool = False
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def problems(self, *, batch_size: int) -> Iterator[str]:
        """Yield widths that heads do not divide, a scale out of range, and templates without a place for a name."""
        if self.text_heads < 1 or self.text_width % self.text_heads:
            yield (
                f"task.text_width is {self.text_width}, which {self.text_heads} heads do not divide: change it or "
                "task.text_heads."
            )
        if not 1 <= self.logit_scale <= MAX_LOGIT_SCALE:
            yield f"task.logit_scale is {self.logit_scale}, give a number from 1 to {MAX_LOGIT_SCALE}."
        if wrong := [template for template in self.templates if "{}" not in template]:
            yield f"task.templates holds {wrong[0]!r}, which has no {{}} in the place of a class's name."
        if not self.templates:
            yield "task.templates is empty, give at least one sentence with {} in the place of a class's name."
