"""Artifacts of a model in training, from one batch: cheap enough to be measured every few hundred steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitreg_hub.analysis.meters.attention import AttentionMeter
from vitreg_hub.analysis.meters.norms import NormMeter
from vitreg_hub.analysis.results import AttentionMass, BlockNorms
from vitreg_hub.tokens import observe

ATTENTION_EVERY = 16
"""Attention costs as much as everything else, so it is measured on one in so many images, the first of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What one batch shows of a model's artifacts.

    Attributes:
        blocks: Norms after each block, with outliers.
        attention: What class token and registers attend to in the last block, in one image of sixteen.
    """

    blocks: tuple[BlockNorms, ...]
    attention: tuple[AttentionMass, ...]

    def scalars(self) -> dict[str, float]:
        """Numbers under names for a tracker: norms and outliers of every block, attention of the last one."""
        numbers = {}
        for i, block in enumerate(self.blocks):
            numbers[f"artifacts/block_{i}/outlier_fraction"] = block.outlier_fraction
            for share in (0.5, 0.99, 1.0):
                numbers[f"artifacts/block_{i}/norm_q{100 * share:g}"] = block.quantile(share)
            for register, norm in enumerate(block.register_norms, start=1):
                numbers[f"artifacts/block_{i}/register_{register}_norm"] = norm
        for mass in self.attention:
            source = mass.source.replace(" ", "_")
            numbers[f"artifacts/{source}_attention_on_registers"] = mass.to_registers
            numbers[f"artifacts/{source}_attention_on_outliers"] = mass.to_outliers
        return numbers


def telemetry(model: nn.Module, images: Tensor, *, cutoff: float | None = None) -> Telemetry:
    """Measure norms, outliers and attention of one batch in one forward pass.

    The model may be in training; its modes, gradients and random numbers stay as they are.

    Args:
        model: A ViT of timm or transformers.
        images: [B, 3, height, width], preprocessed. Outliers are found only among 500 patches or more, and rare ones
            only among many more.
        cutoff: Norm above which a patch token is an outlier; found per block by default.

    Raises:
        DataError: The model is not a ViT that can be read.
    """
    some = math.ceil(len(images) / ATTENTION_EVERY)
    seen = observe(model, images, norms=True, attention=(-1,), attention_images=some)
    meter = NormMeter(cutoff=cutoff)
    meter.update(seen)
    blocks = meter.result()
    outliers = seen.norms[-1, :, seen.order.num_prefix :] > blocks[-1].cutoff.norm
    attention = AttentionMeter(-1)
    attention.update(seen, torch.arange(len(images)), None, outliers)
    return Telemetry(blocks=blocks, attention=attention.result())
