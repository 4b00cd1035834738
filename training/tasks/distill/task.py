"""Token-wise distillation: a student with registers learns the patch tokens of a frozen teacher."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.any_vit import AnyVit, open_vit
from vitreg_hub.errors import RecipeError
from vitreg_hub.network.kinds import kind_of
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.tokens import Tokens, observe
from vitreg_hub.training.tasks.base import Batch, RunFacts, Scorer, StepOutput, Task
from vitreg_hub.training.tasks.distill.settings import Distill


class Teacher:
    """A frozen ViT of timm or transformers that sees the student's images, divided into the same patches."""

    def __init__(self, name: str, *, student: VisionTransformer) -> None:
        """Open it at the student's image size.

        Raises:
            VitregError: It cannot be opened, is untrained, or has another grid of patches.
        """
        height, width = student.patch_embed.img_size
        vit = open_vit(name, img_size=(height, width))
        if vit.untrained:
            raise RecipeError(f"task.teacher {name} has no weights: give a bundle, or an architecture with a tag.")
        channels = {"task.teacher": vit.in_chans, "the student": student.patch_embed.proj.in_channels}
        if set(channels.values()) != {3}:
            told = " and ".join(f"{who} takes {number}" for who, number in channels.items())
            raise RecipeError(f"{told} channels, but distillation needs images of 3 in both: take other models.")
        layout = VitLayout.of(vit.model)
        probe = torch.empty(1, 3, height, width, device="meta")
        grid, wanted = layout.grid(probe), VitLayout.of(student).grid(probe)
        if grid != wanted:
            raise RecipeError(
                f"task.teacher {name} cuts images of {height}x{width} pixels into {grid[0]}x{grid[1]} patches, the "
                f"student into {wanted[0]}x{wanted[1]}: take one with the student's patch size."
            )
        self.model = vit.model.requires_grad_(False)
        self.embed_dim = layout.embedding.out_channels
        images = cast(dict[str, Any], student.pretrained_cfg)
        mean, std = _column(images["mean"]), _column(images["std"])
        own_mean, own_std = _normalisation_of(vit) or (mean, std)
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def __call__(self, images: Tensor) -> Tokens:
        """Tokens after the final norm, of images [B, 3, H, W] that are normalised for the student."""
        self.model.to(images.device)
        return observe(self.model, images * self.scale.to(images) + self.shift.to(images), normed=True).normed


Target = Callable[[Teacher, Batch], Tokens]


def plain_target(teacher: Teacher, batch: Batch) -> Tokens:
    """The teacher's tokens of the unchanged images."""
    return teacher(batch.crops[0])


class DistillNetwork(nn.Module):
    """The student, and a projection of its tokens if the teacher's have another width."""

    def __init__(self, backbone: VisionTransformer, *, teacher_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_class = kind_of(backbone).num_class_tokens(backbone)
        same = backbone.embed_dim == teacher_dim
        self.projection = nn.Identity() if same else nn.Linear(backbone.embed_dim, teacher_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens [B, C, D] and patch tokens [B, P, D] after the final norm, for the teacher's D."""
        # fc_norm is an identity unless the final norm is
        tokens = self.backbone.fc_norm(self.backbone.forward_features(images))
        patches = tokens[:, self.backbone.num_prefix_tokens :]
        return self.projection(tokens[:, : self.num_class]), self.projection(patches)


class DistillTask(Task[DistillNetwork]):
    """Patch tokens, and class tokens if they have a weight, learn from a teacher that never changes."""

    def __init__(
        self, settings: Distill, backbone: VisionTransformer, run: RunFacts, *, target: Target = plain_target
    ) -> None:
        """Open the teacher, and draw the projection if there is one. The student learns what `target` makes.

        Raises:
            VitregError: The teacher cannot be opened, or does not fit the student.
        """
        self.settings, self.target = settings, target
        self.teacher = Teacher(settings.teacher, student=backbone)
        self.network = DistillNetwork(backbone, teacher_dim=self.teacher.embed_dim)
        self.frozen = {}  # the teacher is not state: its name is enough to load it again

    def training_step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Losses from cosine and squared difference of patch tokens, and from the cosine of weighted class tokens.

        Raises:
            RecipeError: Class tokens have a weight, but a network has none.
        """
        settings, target = self.settings, self.target(self.teacher, batch)
        classes, patches = network(batch.crops[0])
        terms = {"cosine": 1 - cosine(patches, target.patches).mean(), "mse": squared(patches, target.patches)}
        loss = settings.cosine_weight * terms["cosine"] + settings.mse_weight * terms["mse"]
        if settings.class_weight:
            if not (classes.shape[1] and target.cls.shape[1]):
                raise RecipeError(
                    f"task.class_weight is {settings.class_weight}, but student or teacher has no class token: set it "
                    "to 0."
                )
            terms["class"] = 1 - cosine(classes[:, 0], target.cls[:, 0]).mean()
            loss = loss + settings.class_weight * terms["class"]
        return StepOutput(loss=loss, metrics={name: term.detach() for name, term in terms.items()})

    @property
    def published(self) -> nn.Module:
        """The student and its projection."""
        return self.network

    def scorer(self, model: DistillNetwork) -> Scorer:
        """Mean cosine between an image's patch tokens and the teacher's."""

        @torch.no_grad()
        def score(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"patch_cosine": cosine(model(images)[1], self.teacher(images).patches).mean(1)}

        return score


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine of every pair of tokens [..., D], in float32."""
    return F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over all tokens and channels, in float32."""
    return F.mse_loss(student.float(), teacher.float())


def _normalisation_of(vit: AnyVit) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation [3, 1, 1] of a network's images; None if they are unknown."""
    if vit.transform is None or vit.mean is None or vit.std is None:
        return None
    return _column(vit.mean), _column(vit.std)


def _column(channels: Sequence[float]) -> Tensor:
    return torch.as_tensor(channels, dtype=torch.float32).view(3, 1, 1)
