"""Heads for segmentation and depth are trained on the patches of a frozen ViT."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.augment import View, depth_view, segmentation_view, without_border
from vitreg_hub.evaluation.dense.depth_head import DepthHead, DepthSettings
from vitreg_hub.evaluation.dense.heads import SegmentationHead, tuples
from vitreg_hub.evaluation.dense.loading import ALONE, Labelled, Measured, Pictures, Workers
from vitreg_hub.evaluation.dense.losses import gradient_loss, pixel_cross_entropy, silog_loss
from vitreg_hub.evaluation.dense.segmentation_metrics import IGNORED
from vitreg_hub.evaluation.dense.steps import Sample, Schedule, trained
from vitreg_hub.network.layout import VitLayout


def train_segmentation(
    model: nn.Module,
    source: Pictures,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int | None = None,
    crop: int = 512,
    steps: int = 40_000,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-3,
    warmup: int = 1500,
    seed: int = 0,
    augment: bool = True,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
    workers: Workers = ALONE,
    **head: Any,
) -> SegmentationHead:
    """Train a linear head for segmentation on the patches of a frozen ViT.

    Source: DINOv3's linear segmentation of ADE20k (dinov3/eval/segmentation), whose settings are the defaults; DINOv2's
    has a weight decay of 1e-4, no dropout and another schedule.

    Args:
        model: A ViT of timm or transformers. It stays as it is, and where it is.
        source: Pictures with masks.
        mean: Of the channels of the model's images, for pixels in [0, 1].
        std: Standard deviations of the channels.
        num_classes: By default as many as the source has names for.
        crop: Side of the square images that the model sees, in pixels.
        steps: As of `Schedule`, like the next six.
        batch_size: See there.
        lr: See there.
        weight_decay: See there.
        warmup: See there.
        seed: See there.
        augment: See there. Without, the shorter side of every picture becomes `crop`, and its centre is seen.
        ignore_index: Label of pixels that do not count.
        reduce_zero_label: Ignore label 0 and number the others from there.
        workers: Who computes.
        **head: Further settings of `SegmentationSettings`, such as `blocks`.

    Returns:
        The head in evaluation mode.

    Raises:
        DataError: A picture or mask cannot be used, or a setting makes no sense.
    """
    names = source.class_names
    if num_classes is None and names is None:
        raise DataError("the names of the masks' classes are unknown, so give num_classes.")
    number = len(names or ()) if num_classes is None else num_classes
    if names is not None and len(names) == number:
        head = {"class_names": tuple(names), **head}
    schedule = Schedule(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        augment=augment,
    )

    labelled = Labelled(
        source=source, num_classes=number, ignore_index=ignore_index, reduce_zero_label=reduce_zero_label
    )
    return trained(
        partial(SegmentationHead, model, num_classes=number, mean=tuple(mean), std=tuple(std), **head),
        _Crops(pictures=labelled, crop=crop, mean=tuple(mean), std=tuple(std)),
        lambda logits, labels, step: pixel_cross_entropy(logits, labels, ignore_index=ignore_index),
        device=VitLayout.of(model).embedding.weight.device,
        number=len(source),
        schedule=schedule,
        workers=workers,
    )


def train_depth(
    model: nn.Module,
    source: Pictures,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop: tuple[int, int] = (416, 544),
    input_size: tuple[int, int] | None = None,
    cut_border: bool = False,
    steps: int = 38_400,
    batch_size: int = 16,
    lr: float = 3e-4,
    weight_decay: float = 1e-4,
    warmup: int = 12_800,
    seed: int = 0,
    augment: bool = True,
    gradient_weight: float = 0.5,
    warm_steps: int = 100,
    workers: Workers = ALONE,
    **head: Any,
) -> DepthHead:
    """Train a linear head for depth on the patches of a frozen ViT.

    Source: DINOv3's linear depth of NYUv2 (dinov3/eval/depth), whose settings are the defaults, with DINOv2's second
    loss. DINOv2 learns at 1e-4, and its heads are other ones, see `DepthHead`.

    Args:
        model: A ViT of timm or transformers. It stays as it is, and where it is.
        source: Pictures with depth.
        mean: Of the channels of the model's images, for pixels in [0, 1].
        std: Standard deviations of the channels.
        crop: Height and width of the parts that the model sees, in pixels.
        input_size: Resize the pictures to this height and width first, as a model of a fixed size needs it.
        cut_border: Cut off the white border of NYUv2's pictures.
        steps: As of `Schedule`, like the next six.
        batch_size: See there.
        lr: See there.
        weight_decay: See there.
        warmup: See there.
        seed: See there.
        augment: See there. Without, the model sees all of every picture, which must be of one size, or `input_size`.
        gradient_weight: Weight of the loss of slopes beside the scale-invariant one.
        warm_steps: Steps during which the latter has its warm form.
        workers: Who computes.
        **head: Settings of `DepthSettings`, such as `max_depth` or `blocks`. Depth beyond its limits does not count.

    Returns:
        The head in evaluation mode.

    Raises:
        DataError: A picture or its depth cannot be used, or a setting makes no sense.
    """
    schedule = Schedule(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        seed=seed,
        augment=augment,
    )
    make = partial(DepthHead, model, mean=tuple(mean), std=tuple(std), **head)
    limits = DepthSettings(**tuples(head))

    sample = _Parts(
        pictures=Measured(source=source),
        crop=crop,
        input_size=input_size,
        cut_border=cut_border,
        limits=(limits.min_depth, limits.max_depth),
        mean=tuple(mean),
        std=tuple(std),
    )

    def loss(depth: Tensor, target: Tensor, step: int) -> Tensor:
        target = target[:, None]
        slopes = gradient_weight * gradient_loss(depth, target) if gradient_weight else 0
        return silog_loss(depth, target, warm=step < warm_steps) + slopes

    device = VitLayout.of(model).embedding.weight.device
    return trained(make, sample, loss, device=device, number=len(source), schedule=schedule, workers=workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Crops:
    """Squares of pictures and their labels, at random places or in the middle."""

    pictures: Labelled
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, index: int, rng: np.random.Generator | None) -> Sample:
        picture, labels = self.pictures(index)
        view = View(image=picture.image, values=labels, unknown=self.pictures.ignore_index)
        crop = self.crop
        if rng is None:
            view = view.short_side(crop)
            view = view.cut((view.image.height - crop) // 2, (view.image.width - crop) // 2, crop, crop)
        else:
            view = segmentation_view(view, rng, crop=crop)
        return view.tensors(crop, crop, mean=self.mean, std=self.std)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Parts of pictures and their depths at random places, or whole pictures."""

    pictures: Measured
    crop: tuple[int, int]
    input_size: tuple[int, int] | None
    cut_border: bool
    limits: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, index: int, rng: np.random.Generator | None) -> Sample:
        picture, depth = self.pictures(index)
        counts = (depth > self.limits[0]) & (depth < self.limits[1])
        view = View(image=picture.image, values=np.where(counts, depth, 0).astype(np.float32), unknown=0)
        view = without_border(view) if self.cut_border else view
        view = view.resized(*self.input_size) if self.input_size else view
        size = view.values.shape
        if rng is not None:
            view, size = depth_view(view, rng, crop=self.crop), self.crop
        return view.tensors(size[0], size[1], mean=self.mean, std=self.std)
