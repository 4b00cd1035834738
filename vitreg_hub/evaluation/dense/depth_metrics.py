"""How well predicted distances of pixels agree with the true ones."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.maps import Maps, pairs

Crop = Literal["nyu_eigen"] | None
"""Part of a picture that is scored; None: all of it."""

MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0
"""Metres; what NYUv2 is scored between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthScores:
    """Errors of predicted depth: means over images, each over its own pixels. Of `a1` to `a3` more is better.

    Attributes:
        rmse: Root of the mean square, metres.
        rmse_log: The same of the natural logarithm.
        abs_rel: Mean of the error divided by the depth.
        sq_rel: Mean of the squared error divided by the depth, metres.
        log10: Mean difference of the decimal logarithms.
        silog: Spread of the logarithms' difference (which a wrong scale does not change), times 100.
        mae: Mean, metres.
        a1: Share of pixels within a factor of 1.25.
        a2: Within 1.25 squared.
        a3: Within 1.25 cubed.
    """

    rmse: float
    rmse_log: float
    abs_rel: float
    sq_rel: float
    log10: float
    silog: float
    mae: float
    a1: float
    a2: float
    a3: float


METRICS = tuple(field.name for field in fields(DepthScores))


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthErrors:
    """The scores of every image, from which means are formed.

    Attributes:
        values: [N, metrics] float64, in the order of `METRICS`; NaN of an image without a pixel that counts.
    """

    values: Tensor

    @classmethod
    def of(
        cls,
        prediction: Tensor,
        target: Tensor,
        *,
        min_depth: float = MIN_DEPTH,
        max_depth: float = MAX_DEPTH,
        crop: Crop = None,
        align: bool = False,
    ) -> Self:
        """Those of one image; arguments and errors as of `depth_scores`, for one map [H, W] each."""
        if not 0 <= min_depth < max_depth:
            raise DataError(
                f"min_depth is {min_depth:g} and max_depth is {max_depth:g}: give 0 <= min_depth < max_depth."
            )
        height, width = target.shape
        counts = (target > min_depth) & (target < max_depth) & crop_mask((height, width), crop).to(target.device)
        predicted, true = prediction[counts].double(), target[counts].double()
        if align:
            scale, shift = least_squares(predicted, true)
            predicted = predicted * scale + shift
        scores = _scores(predicted.clamp(min_depth, max_depth), true)
        return cls(values=torch.tensor([list(asdict(scores).values())], dtype=torch.float64))

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """Those of all images of several parts, such as batches or processes.

        Raises:
            DataError: There are none.
        """
        values = [part.values for part in parts]
        if not values:
            raise DataError("there is nothing to score: give at least one image.")
        return cls(values=torch.cat(values))

    def scores(self) -> DepthScores:
        """Means over images; those without a pixel that counts are left out."""
        return DepthScores(**dict(zip(METRICS, self.values.nanmean(dim=0).tolist(), strict=True)))


def crop_mask(size: tuple[int, int], crop: Crop) -> Tensor:
    """Which pixels [H, W] of a picture are scored.

    Source: Eigen et al. 2014, as everybody who scores NYUv2: rows 45 to 471 and columns 41 to 601 of 480 x 640, in
    proportion for other sizes.

    Raises:
        DataError: There is no such crop.
    """
    mask = torch.zeros(size, dtype=torch.bool)
    if crop is None:
        return ~mask
    if crop != "nyu_eigen":
        raise DataError(f"there is no crop {crop!r}: give 'nyu_eigen' or None.")
    height, width = size
    top, bottom = (int(row / 480 * height) for row in (45, 471))
    left, right = (int(column / 640 * width) for column in (41, 601))
    mask[top:bottom, left:right] = True
    return mask


def least_squares(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring predictions [N] closest to the truth [N], for models that tell depth only up to them.

    If all are equal, they are shifted alone.
    """
    if not len(true):
        return true.new_ones(()), true.new_zeros(())
    centred = predicted - predicted.mean()
    spread = centred.square().sum()
    scale = (centred * true).sum() / spread if spread > 0 else torch.ones_like(spread)
    return scale, true.mean() - scale * predicted.mean()


def _scores(predicted: Tensor, true: Tensor) -> DepthScores:
    difference = predicted - true
    logs = predicted.log() - true.log()
    ratio = torch.maximum(predicted / true, true / predicted)
    within = [(ratio < 1.25**power).double().mean().item() for power in (1, 2, 3)]
    return DepthScores(
        rmse=difference.square().mean().sqrt().item(),
        rmse_log=logs.square().mean().sqrt().item(),
        abs_rel=(difference.abs() / true).mean().item(),
        sq_rel=(difference.square() / true).mean().item(),
        log10=(predicted.log10() - true.log10()).abs().mean().item(),
        silog=100 * (logs.square().mean() - logs.mean().square()).clamp_min(0).sqrt().item(),
        mae=difference.abs().mean().item(),
        a1=within[0],
        a2=within[1],
        a3=within[2],
    )


def depth_scores(
    prediction: Maps,
    target: Maps,
    *,
    min_depth: float = MIN_DEPTH,
    max_depth: float = MAX_DEPTH,
    crop: Crop = None,
    align: bool = False,
) -> DepthScores:
    """Errors of predicted depth: means over images, each over its own pixels.

    Source: dinov3/eval/depth (eval.py and metrics.py).

    Args:
        prediction: Metres: one map [H, W], a stack [B, H, W] or [B, 1, H, W], or any iterable of maps. They are cut to
            the range from `min_depth` to `max_depth`.
        target: True depths, in maps of the same sizes. Pixels that are not between the limits, such as 0 for unknown
            depth, do not count.
        min_depth: Metres.
        max_depth: Metres.
        crop: "nyu_eigen" scores only the part of the pictures for which NYUv2's depth is reliable.
        align: First scale and shift each prediction for the least squared error, for models that tell depth only up to
            them.

    Raises:
        DataError: The maps do not fit each other, or the limits or the crop make no sense.
    """
    errors = (
        DepthErrors.of(predicted, true, min_depth=min_depth, max_depth=max_depth, crop=crop, align=align)
        for predicted, true in pairs(prediction, target)
    )
    return DepthErrors.together(errors).scores()
