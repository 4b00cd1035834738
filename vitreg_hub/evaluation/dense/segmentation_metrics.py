"""How well predicted classes of pixels agree with the true ones."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.maps import Maps, pairs

IGNORED = 255
"""The class of pixels that do not count, by convention of all data sets of this kind."""


def zero_label_reduced(labels: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Labels of data sets whose class 0 means "nothing known", such as ADE20k: it is ignored, the others move down."""
    moved = labels.long() - 1
    return moved.masked_fill((labels == 0) | (labels == ignore_index), ignore_index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationScores:
    """How well predicted classes of pixels agree with the true ones; all in [0, 1].

    Attributes:
        mean_iou: Mean of `per_class` over the classes that occur.
        per_class: Intersection over union of every class; NaN of one that is neither predicted nor true anywhere.
        accuracy: Share of the pixels whose class is right.
        mean_accuracy: Mean of `class_accuracy` over the classes that occur.
        class_accuracy: Share of every class's pixels that are found; NaN of a class without pixels.
    """

    mean_iou: float
    per_class: tuple[float, ...]
    accuracy: float
    mean_accuracy: float
    class_accuracy: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationCounts:
    """Pixels of every class in every image, from which scores are formed.

    torchmetrics' confusion matrix is not used: labels out of range, which the official code counts as predicted but not
    as true pixels, have no place in it.

    Attributes:
        areas: [N, 3, C] int64 for each image: pixels that are rightly found, predicted, true.
    """

    areas: Tensor

    @classmethod
    def of(
        cls,
        prediction: Tensor,
        label: Tensor,
        *,
        num_classes: int,
        ignore_index: int = IGNORED,
        reduce_zero_label: bool = False,
    ) -> Self:
        """Those of one image; arguments and errors as of `segmentation_scores`, for one map [H, W] each."""
        if prediction.is_floating_point() or label.is_floating_point():
            raise DataError("classes of pixels must be whole numbers: give the argmax of logits.")
        if reduce_zero_label:
            label = zero_label_reduced(label, ignore_index=ignore_index)
        counted = label != ignore_index
        prediction, label = prediction[counted].long(), label[counted].long()
        if prediction.numel() and not 0 <= prediction.min() <= prediction.max() < num_classes:
            raise DataError(
                f"the classes {int(prediction.min())} to {int(prediction.max())} are predicted, but there are "
                f"{num_classes}, from 0."
            )
        true = label[(label >= 0) & (label < num_classes)]
        found = prediction[prediction == label]
        areas = [torch.bincount(pixels, minlength=num_classes) for pixels in (found, prediction, true)]
        return cls(areas=torch.stack(areas)[None].cpu())

    @classmethod
    def together(cls, parts: Iterable[Self]) -> Self:
        """Those of all images of several parts, such as batches or processes.

        Raises:
            DataError: There are none.
        """
        areas = [part.areas for part in parts]
        if not areas:
            raise DataError("there is nothing to score: give at least one image.")
        return cls(areas=torch.cat(areas))

    def scores(self) -> SegmentationScores:
        """Scores over all images together, as the official code forms them: not the mean over images."""
        found, predicted, true = self.areas.sum(dim=0).double()
        per_class, class_accuracy = found / (predicted + true - found), found / true
        return SegmentationScores(
            mean_iou=per_class.nanmean().item(),
            per_class=tuple(per_class.tolist()),
            accuracy=(found.sum() / true.sum()).item(),
            mean_accuracy=class_accuracy.nanmean().item(),
            class_accuracy=tuple(class_accuracy.tolist()),
        )


def segmentation_scores(
    predictions: Maps,
    labels: Maps,
    *,
    num_classes: int,
    ignore_index: int = IGNORED,
    reduce_zero_label: bool = False,
) -> SegmentationScores:
    """Mean intersection over union and accuracies of predicted classes of pixels.

    Source: dinov3/eval/segmentation/metrics.py, which gives percent. Pixels are counted over all images before they
    are divided.

    Args:
        predictions: Class of every pixel: one map [H, W], a stack [B, H, W], or any iterable of maps.
        labels: True classes, in maps of the same sizes. A label out of range (which a data set should not have) is no
            class's pixel, but what is predicted there counts.
        num_classes: How many classes there are.
        ignore_index: Label of pixels that do not count.
        reduce_zero_label: Ignore label 0 and number the others from there, as ADE20k's 151 labels of 150 classes.

    Raises:
        DataError: The maps do not fit each other or the number of classes.
    """
    counts = (
        SegmentationCounts.of(
            prediction,
            label,
            num_classes=num_classes,
            ignore_index=ignore_index,
            reduce_zero_label=reduce_zero_label,
        )
        for prediction, label in pairs(predictions, labels)
    )
    return SegmentationCounts.together(counts).scores()
