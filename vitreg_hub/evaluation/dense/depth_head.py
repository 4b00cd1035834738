"""The linear head that tells how far away every pixel is."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.depth_metrics import MAX_DEPTH, MIN_DEPTH
from vitreg_hub.evaluation.dense.heads import DenseHead, HeadSettings, Images, tuples

Spacing = Literal["uniform", "sid", "dinov2_sid"]
Weights = Literal["linear", "softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthSettings(HeadSettings):
    """What a head for depth reads, and how it tells depth.

    Attributes:
        bins: Depths, spread from `min_depth` to `max_depth`, whose weighted mean is the depth; 1 for regression, which
            is `min_depth` + relu, or `max_depth` x sigmoid if `weights` is "sigmoid".
        min_depth: Metres.
        max_depth: Metres. DINOv2's published linear heads always have 80, also those for NYUv2.
        spacing: "uniform", or "sid", which is uniform in the logarithm (DINOv3's "log"). "dinov2_sid" goes from 10 to
            the power of `min_depth` to that of `max_depth`, as DINOv2's code does.
        weights: What makes weights of the bins from the layer's outputs, which are then divided by their sum: "linear"
            (relu + 0.1), "softmax" or "sigmoid".
        upsample: Times that the outputs are enlarged before they become weights; 4 in DINOv2, 1 in DINOv3.
    """

    bins: int = 256
    min_depth: float = MIN_DEPTH
    max_depth: float = MAX_DEPTH
    spacing: Spacing = "uniform"
    weights: Weights = "linear"
    upsample: int = 1


def depth_of(outputs: Tensor, settings: DepthSettings) -> Tensor:
    """Depth [B, 1, h, w] in metres from a layer's outputs [B, bins, h, w].

    Source: AdaBins (arXiv 2011.14141), as in FeaturesToDepth of dinov3/eval/depth/models and in DINOv2's depth heads.
    """
    low, high, bins = settings.min_depth, settings.max_depth, outputs.shape[1]
    if bins == 1:
        return outputs.sigmoid() * high if settings.weights == "sigmoid" else outputs.relu() + low
    if settings.spacing == "uniform":
        depths = torch.linspace(low, high, bins, device=outputs.device)
    elif settings.spacing == "sid":
        start, end = torch.tensor([low, high]).log().tolist()
        depths = torch.linspace(start, end, bins, device=outputs.device).exp()
    else:
        depths = torch.logspace(low, high, bins, device=outputs.device)
    if settings.weights == "softmax":
        weights = outputs.softmax(dim=1)
    else:
        weights = outputs.sigmoid() if settings.weights == "sigmoid" else outputs.relu() + 0.1
        weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bkhw,k->bhw", weights, depths)[:, None]


class DepthHead(DenseHead[DepthSettings]):
    """Tells how far away every pixel is from the patches of a frozen ViT.

    Source: DINOv3's linear head on the last block by default. DINOv2's published ones: `normed=False, batchnorm=False,
    use_cls=True, upsample=4, max_depth=80`, and as blocks the last one or four (of 12: 2, 5, 8, 11).

        head = DepthHead(model, max_depth=10)
        depth = head.predict(images, flip=True)  # [B, H, W], metres
    """

    settings_type = DepthSettings

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        """A new head.

        Args:
            model: A ViT of timm or transformers, on the device where it is to run.
            **settings: Of `DepthSettings`.

        Raises:
            DataError: The model cannot be read, or the settings make no sense for it.
        """
        chosen = DepthSettings(**tuples(settings))
        if not 0 <= chosen.min_depth < chosen.max_depth or (chosen.spacing == "sid" and not chosen.min_depth):
            raise DataError(
                f"min_depth is {chosen.min_depth:g} and max_depth is {chosen.max_depth:g}: give 0 < min_depth < "
                "max_depth."
            )
        if chosen.bins < 1 or chosen.upsample < 1 or (chosen.bins == 1 and chosen.weights == "softmax"):
            raise DataError(
                f"bins is {chosen.bins}, weights is {chosen.weights!r} and upsample is {chosen.upsample}: give "
                "at least 1 of both, and 'linear' or 'sigmoid' for 1 bin, which is regression."
            )
        super().__init__(model, chosen, out_channels=chosen.bins)

    def read(self, features: Tensor) -> Tensor:
        """Depth [B, 1, h, w] in metres from features."""
        outputs = super().read(features)
        if self.settings.upsample > 1:  # of the outputs, not of the more numerous features: a linear layer commutes
            outputs = F.interpolate(outputs, scale_factor=self.settings.upsample, mode="bilinear", align_corners=False)
        return depth_of(outputs, self.settings)

    def predict(self, images: Images, **how: Any) -> Tensor:
        """Depth [B, height, width] in metres, between `min_depth` and `max_depth`; arguments as of `maps`.

        With `flip`, depths are averaged at the resolution of the patches, as officially.
        """
        return self.maps(images, **how)[:, 0].clamp(self.settings.min_depth, self.settings.max_depth)
