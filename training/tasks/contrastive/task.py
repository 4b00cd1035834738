"""Images against captions: our image tower with open_clip's text tower, tokenizer and loss."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import DataError, RecipeError
from vitreg_hub.evaluation.zero_shot import class_embeddings
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.training.distributed.collectives import rank, world_size
from vitreg_hub.training.tasks.base import Batch, RunFacts, Scorer, StepOutput, Task, correct
from vitreg_hub.training.tasks.contrastive.open_clip_files import save_open_clip
from vitreg_hub.training.tasks.contrastive.settings import MAX_LOGIT_SCALE, Contrastive


class TwoTowers(nn.Module):
    """Both towers and the scale of their similarities, like the parts of open_clip's `CustomTextCLIP`.

    Source: open_clip/transformer.py, `VisionTransformer` (the projection's first weights) and `TextTransformer`.
    """

    def __init__(self, backbone: VisionTransformer, settings: Contrastive) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = nn.Linear(backbone.num_features, settings.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=backbone.num_features**-0.5)
        self.text = open_clip().transformer.TextTransformer(
            context_length=settings.context_length,
            width=settings.text_width,
            heads=settings.text_heads,
            layers=settings.text_layers,
            output_dim=settings.embed_dim,
        )
        # one element instead of a scalar, because FSDP2 cannot shard scalars
        self.logit_scale = nn.Parameter(torch.tensor([math.log(settings.logit_scale)]))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of images [B, 3, H, W], of length 1 if `normalize`."""
        features = self.projection(self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True))
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features [B, E] of tokenized texts [B, context length], of length 1 if `normalize`."""
        features = self.text(tokens)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images and texts [B, E], of length 1, and the scale of their similarities [1]."""
        image_features = self.encode_image(images, normalize=True)
        return image_features, self.encode_text(tokens, normalize=True), self.logit_scale.exp()


class ContrastiveTask(Task[TwoTowers]):
    """Matches each image of the global batch with its caption, and each caption with its image."""

    def __init__(self, settings: Contrastive, backbone: VisionTransformer, run: RunFacts) -> None:
        """Draw the text tower and the projection. Without names of classes there will be no score.

        Raises:
            RecipeError: open_clip is not installed.
        """
        self.settings, self.label_names = settings, tuple(run.label_names or ())
        self.network = TwoTowers(backbone, settings)
        self.frozen = {}

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens [B, context length] of texts, truncated where they are too long."""
        return open_clip().tokenize(list(texts), self.settings.context_length)

    def training_step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """open_clip's loss over the captions and images of all processes.

        Raises:
            DataError: The batch has no captions.
        """
        if batch.texts is None:
            raise DataError("contrastive training needs captions: give data.text_column, or data that have some.")
        images = batch.crops[0]
        image_features, text_features, scale = network(images, self.tokenize(batch.texts).to(images.device))
        criterion = open_clip().ClipLoss(
            local_loss=self.settings.local_loss, gather_with_grad=True, rank=rank(), world_size=world_size()
        )
        with torch.autocast(images.device.type, enabled=False):
            loss = criterion(image_features.float(), text_features.float(), scale.float())
        return StepOutput(loss=loss, metrics={"logit_scale": scale.detach().squeeze(0)})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keep the scale between 1 and `MAX_LOGIT_SCALE`."""
        self.network.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))

    @property
    def published(self) -> nn.Module:
        """Both towers."""
        return self.network

    def write_beside(self, model: TwoTowers, bundle: ModelBundle, folder: Path) -> None:
        """Write both towers in open_clip's form, to a folder with the bundle's name and `-open_clip`."""
        save_open_clip(model, folder.with_name(f"{folder.name}{TOWER_SUFFIX}"), bundle=bundle, replace=True)

    def scorer(self, model: TwoTowers) -> Scorer:
        """Zero-shot accuracy from the classes' names."""
        if not self.label_names:
            return lambda images, labels: {}
        classifier = class_embeddings(model, self.tokenize, self.label_names, self.settings.templates)

        @torch.no_grad()
        def score(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"zero_shot_accuracy": correct(model.encode_image(images, normalize=True) @ classifier, labels)}

        return score


def open_clip() -> ModuleType:
    """Import open_clip, which is an extra and takes seconds to import.

    Raises:
        RecipeError: It is not installed.
    """
    if find_spec("open_clip") is None:
        raise RecipeError("contrastive training needs open_clip: pip install 'vitreg_hub[clip]'.")
    import open_clip

    return open_clip
