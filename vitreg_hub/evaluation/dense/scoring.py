"""Heads for segmentation and depth are scored on pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.augment import sides
from vitreg_hub.evaluation.dense.depth_head import DepthHead
from vitreg_hub.evaluation.dense.depth_metrics import Crop, DepthErrors, DepthScores
from vitreg_hub.evaluation.dense.heads import SegmentationHead
from vitreg_hub.evaluation.dense.loading import ALONE, Labelled, Measured, Picture, Pictures, Workers, made
from vitreg_hub.evaluation.dense.segmentation_metrics import (
    IGNORED,
    SegmentationCounts,
    SegmentationScores,
)
from vitreg_hub.passes import failing_together, gathered

Counted = TypeVar("Counted")

ROUND_UP_TO = 32
"""To multiples of which the shorter side is rounded up in views that are smaller than the picture, as officially."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """What a model tells of a picture, kept for a report.

    Attributes:
        name: Of the picture.
        image: RGB.
        predicted: [H, W] classes (int64), or metres (float32), or boxes [K, 4] (left, top, right, bottom in pixels).
        truth: [H, W] likewise.
    """

    name: str
    image: Image.Image
    predicted: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationResult:
    """How well a head tells classes.

    Attributes:
        scores: Over all pictures.
        counts: Of each picture, from which the scores of any of them can be formed.
        examples: The first pictures.
    """

    scores: SegmentationScores
    counts: SegmentationCounts
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthResult:
    """How well a head tells depth.

    Attributes:
        scores: Means over all pictures.
        errors: Of each picture.
        examples: The first pictures.
    """

    scores: DepthScores
    errors: DepthErrors
    examples: tuple[Example, ...] = ()


def evaluate_segmentation(
    head: SegmentationHead,
    source: Pictures,
    *,
    crop: int | None = 512,
    stride: int | None = None,
    input_size: tuple[int, int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
    examples: int = 4,
    workers: Workers = ALONE,
) -> SegmentationResult:
    """Score a head for segmentation at the pictures' own sizes.

    Source: DINOv3's linear segmentation (dinov3/eval/segmentation/eval.py), as DINOv2's: the shorter side is resized to
    the window's, which slides by two thirds of its side; DINOv2's "+ms" adds scales and mirrored views, whose
    probabilities are averaged.

    Args:
        head: A trained head that knows the model's mean and std.
        source: Pictures with masks.
        crop: Side of the sliding windows in pixels; None: the whole picture at once.
        stride: Pixels from one window to the next.
        input_size: For whole pictures, resize them to this height and width (officially 512 x 512); by default they are
            seen at their own size.
        scales: Of the resized pictures. Below 1, the shorter side is rounded up to a multiple of 32.
        flip: Whether mirrored views are seen as well.
        ignore_index: Label of pixels that do not count.
        reduce_zero_label: Ignore label 0 and number the others from there.
        examples: Pictures that are kept for a report, the first ones.
        workers: Who computes.

    Raises:
        DataError: A picture or mask cannot be used, or a setting makes no sense.
    """
    if not scales or min(scales) <= 0:
        raise DataError(f"scales are {list(scales)}: give at least one, all above 0.")
    classes = head.settings.num_classes

    ready = Labelled(source=source, num_classes=classes, ignore_index=ignore_index, reduce_zero_label=reduce_zero_label)

    def score(picture: Picture, labels: np.ndarray) -> tuple[SegmentationCounts, np.ndarray]:
        seen = list(views(picture.image, crop=crop, scales=scales))
        how: dict[str, Any] = dict(size=labels.shape, crop=crop, stride=stride, input_size=input_size)
        if len(seen) == 1:
            predicted = head.predict(seen[0], flip=flip, **how)[0]
        else:
            predicted = torch.stack([head.probabilities(view, flip=flip, **how)[0] for view in seen]).sum(0).argmax(0)
        predicted = predicted.cpu()
        counts = SegmentationCounts.of(
            predicted, torch.from_numpy(labels), num_classes=classes, ignore_index=ignore_index
        )
        return counts, predicted.numpy()

    counts, kept = _scored(ready, score, number=len(source), examples=examples, workers=workers)
    together = SegmentationCounts.together(counts)
    return SegmentationResult(scores=together.scores(), counts=together, examples=kept)


def evaluate_depth(
    head: DepthHead,
    source: Pictures,
    *,
    crop: Crop = None,
    flip: bool = True,
    input_size: tuple[int, int] | None = None,
    min_depth: float | None = None,
    max_depth: float | None = None,
    align: bool = False,
    examples: int = 4,
    workers: Workers = ALONE,
) -> DepthResult:
    """Score a head for depth at the pictures' own sizes.

    Source: DINOv3's linear depth (dinov3/eval/depth/eval.py), as DINOv2's: the whole picture and its mirror image are
    seen, and the two depths averaged. On NYUv2 both use `crop="nyu_eigen"`.

    Args:
        head: A trained head that knows the model's mean and std.
        source: Pictures with depth.
        crop: Part of the pictures that is scored, see `depth_scores`.
        flip: Whether the mirrored view is seen as well.
        input_size: Resize the pictures to this height and width, as a model of a fixed size needs it.
        min_depth: As of `depth_scores`; by default the head's.
        max_depth: Likewise.
        align: As of `depth_scores`.
        examples: Pictures that are kept for a report, the first ones.
        workers: Who computes.

    Raises:
        DataError: A picture or its depth cannot be used, or a setting makes no sense.
    """
    low = head.settings.min_depth if min_depth is None else min_depth
    high = head.settings.max_depth if max_depth is None else max_depth

    def score(picture: Picture, depth: np.ndarray) -> tuple[DepthErrors, np.ndarray]:
        image = picture.image
        if input_size:
            image = image.resize((input_size[1], input_size[0]), Image.Resampling.BILINEAR)
        predicted = head.predict(image, size=depth.shape, flip=flip)[0].cpu()
        target = torch.from_numpy(depth)
        errors = DepthErrors.of(predicted, target, min_depth=low, max_depth=high, crop=crop, align=align)
        return errors, predicted.numpy()

    errors, kept = _scored(Measured(source=source), score, number=len(source), examples=examples, workers=workers)
    together = DepthErrors.together(errors)
    return DepthResult(scores=together.scores(), errors=together, examples=kept)


def views(image: Image.Image, *, crop: int | None, scales: Sequence[float]) -> Iterator[Image.Image]:
    """Yield a picture at every scale, its shorter side that of the windows where there are any."""
    for scale in scales:
        short = int((crop or min(image.size)) * scale)
        if scale < 1:
            short = math.ceil(short / ROUND_UP_TO) * ROUND_UP_TO
        height, width = sides(image.height, image.width, short=short)
        same = (width, height) == image.size
        yield image if same else image.resize((width, height), Image.Resampling.BILINEAR)


def _scored(
    ready: Callable[[int], tuple[Picture, np.ndarray]],
    score: Callable[[Picture, np.ndarray], tuple[Counted, np.ndarray]],
    *,
    number: int,
    examples: int,
    workers: Workers,
) -> tuple[list[Counted], tuple[Example, ...]]:
    """What was counted of all pictures, in their order, and the first of them; every process scores its share."""
    rank, world_size = workers.rank, workers.world_size
    mine: list[tuple[int, Counted, Example | None]] = []
    indices = range(rank, number, world_size)
    shown = workers.progress and rank == 0
    with failing_together(world_size=world_size):
        pictures = made(ready, indices, num_workers=workers.num_workers)
        bar = tqdm(
            zip(indices, pictures, strict=True), total=len(indices), unit="image", disable=not shown, leave=False
        )
        for index, (picture, truth) in bar:
            counted, predicted = score(picture, truth)
            kept = None
            if index < examples:
                kept = Example(name=picture.name, image=picture.image, predicted=predicted, truth=truth)
            mine.append((index, counted, kept))
    found = sorted((part for share in gathered(mine, world_size=world_size) for part in share), key=lambda x: x[0])
    return [counted for _, counted, _ in found], tuple(example for *_, example in found if example is not None)
