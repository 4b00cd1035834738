"""What a classification is worth: accuracies with their intervals, per class, and calibration."""

import math
from dataclasses import dataclass

from torch import Tensor

from vitreg_hub.errors import DataError

CONFIDENCE = 1.959964
"""Standard deviations to either side of the mean that hold 95 % of a normal distribution."""
CALIBRATION_BINS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share in [0, 1] of counted cases, and the 95 % interval in which the true one lies (Wilson's)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: float, cases: int) -> "Share":
        """Of so many cases, so many hits.

        Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
        """
        if cases < 1:
            raise DataError("a share of no cases: give at least one image.")
        share, spread = hits / cases, CONFIDENCE**2 / cases
        middle = (share + spread / 2) / (1 + spread)
        half = CONFIDENCE * math.sqrt(share * (1 - share) / cases + spread / cases / 4) / (1 + spread)
        return cls(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScores:
    """How well classes of images were told.

    Attributes:
        num_images: Labelled images that were asked.
        top1: Share whose class got the highest score.
        top5: Share whose class is among the five highest; None with five classes or fewer.
        per_class: Share of the images of each class that got it; None for a class without images.
        confusion: [C][C] counts: row by the true class, column by the one that was told.
        calibration_error: Expected calibration error of probabilities over 15 bins; None for votes.
    """

    num_images: int
    top1: Share
    top5: Share | None
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float | None = None

    @property
    def mean_per_class(self) -> float:
        """Mean of `per_class` over the classes that have images."""
        known = [share for share in self.per_class if share is not None]
        return sum(known) / len(known)


def classification_scores(scores: Tensor, labels: Tensor, *, probabilities: bool = False) -> ClassScores:
    """Score a classification.

    Args:
        scores: [N, C], higher for a likelier class: logits, votes or probabilities.
        labels: [N] int64 in [0, C).
        probabilities: Whether the scores are probabilities, whose calibration is measured too.

    Raises:
        DataError: There are no images, or labels outside of the classes.
    """
    from torchmetrics.functional.classification import (  # takes two seconds
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    number, num_classes = scores.shape
    if not number:
        raise DataError("no image has a label: give labelled images.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"labels from {int(labels.min())} to {int(labels.max())} for {num_classes} classes: number them from 0."
        )

    def share(top: int) -> Share:
        value = multiclass_accuracy(scores, labels, num_classes, average="micro", top_k=top)
        return Share.of(round(value.item() * number), number)

    confusion = multiclass_confusion_matrix(scores.argmax(dim=1), labels, num_classes)
    counts = confusion.sum(dim=1)
    right = confusion.diagonal()
    return ClassScores(
        num_images=number,
        top1=share(1),
        top5=share(5) if num_classes > 5 else None,
        per_class=tuple(
            hits / count if count else None for hits, count in zip(right.tolist(), counts.tolist(), strict=True)
        ),
        confusion=tuple(map(tuple, confusion.tolist())),
        calibration_error=multiclass_calibration_error(
            scores, labels, num_classes, n_bins=CALIBRATION_BINS, norm="l1"
        ).item()
        if probabilities
        else None,
    )
