"""What heads for segmentation and depth are trained by; losses over pixels whose truth is known."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitreg_hub.evaluation.dense.segmentation_metrics import IGNORED

EPS = 1e-3
"""Metres that are added before logarithms."""
SCALE_SHARE = 0.15
"""How much of a wrong scale counts in the scale-invariant loss."""


def pixel_cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Mean cross entropy of logits [B, C, H, W] to labels [B, H, W]; 0 where no pixel counts."""
    counted = (labels != ignore_index).sum().clamp_min(1)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / counted


def silog_loss(prediction: Tensor, target: Tensor, *, warm: bool = False) -> Tensor:
    """Scale-invariant logarithmic loss: the root of variance + 0.15 mean squared of log(prediction) - log(target).

    Source: SigLoss of DINOv2 and DINOv3 (their variance is unbiased, over the pixels of all images of a batch).

    Args:
        prediction: Metres, [B, 1, H, W].
        target: Metres; pixels without known depth are 0.
        warm: The form of the first 100 steps, without the variance.
    """
    valid = target > 0
    difference = (prediction[valid] + EPS).log() - (target[valid] + EPS).log()
    if warm and len(difference):
        return SCALE_SHARE**0.5 * difference.mean().abs()
    if len(difference) < 2:
        return prediction.sum() * 0
    return (difference.var() + SCALE_SHARE * difference.mean().square()).clamp_min(1e-12).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor, *, logarithmic: bool = True) -> Tensor:
    """Differences of the slopes of depth at four scales: how sharp its edges are.

    Source: GradientLogLoss of dinov3/eval/depth, after MegaDepth. (DINOv2's takes every second image and channel
    instead of every second row and column.)

    Args:
        prediction: Metres, [B, 1, H, W].
        target: Metres; pixels without known depth are 0.
        logarithmic: Slopes of the logarithm.
    """
    valid = target > 0
    if logarithmic:
        prediction, target = (prediction + EPS).log(), (target + EPS).log()
    difference = torch.where(valid, prediction - target, 0)
    total = prediction.new_zeros(())
    for step in (1, 2, 4, 6):
        some, known = difference[..., ::step, ::step], valid[..., ::step, ::step]
        slopes = [
            (some[..., :-2, :] - some[..., 2:, :])[known[..., :-2, :] & known[..., 2:, :]],
            (some[..., :, :-2] - some[..., :, 2:])[known[..., :, :-2] & known[..., :, 2:]],
        ]
        total = total + torch.cat(slopes).abs().sum() / known.sum().clamp_min(1)
    return total
