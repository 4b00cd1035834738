"""Logistic regression on frozen features, as the registers paper scores single tokens."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm import tqdm

from vitreg_hub.errors import DataError

STRENGTHS = tuple((10 ** torch.linspace(-6, 5, 45)).tolist())
"""Values of C, the inverse strength of the penalty, from which one is chosen."""
TOLERANCE = 1e-12
ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class LogisticFit:
    """A logistic regression.

    Attributes:
        model: scikit-learn's, on features in float64.
        strength: C, as it was chosen.
        held_out_accuracy: By each C, of the images that were kept back to choose it.
    """

    model: LogisticRegression
    strength: float
    held_out_accuracy: dict[float, float]

    def probabilities(self, features: Tensor, *, num_classes: int) -> Tensor:
        """Of each class [N, C] for features [N, D]; 0 for a class that was not trained."""
        known = torch.from_numpy(self.model.predict_proba(features.double().numpy()))
        return known.new_zeros(len(features), num_classes).index_copy(1, torch.from_numpy(self.model.classes_), known)


def fit_logistic(
    train: Tensor,
    train_labels: Tensor,
    held_out: Tensor,
    held_out_labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = False,
) -> LogisticFit:
    """Choose C on held-out training images, the first of equals, and fit all of them with it.

    Source: dinov3/eval/log_regression.py; the features are not normalised. Darcet et al., table 1.

    Args:
        train: Features [N, D] of any type.
        train_labels: [N] int64.
        held_out: [V, D], of other training images.
        held_out_labels: [V] int64.
        strengths: Values of C, in the order in which they are tried.
        progress: Show a progress bar.

    Raises:
        DataError: There are fewer than two classes.
    """
    if len(train_labels.unique()) < 2:
        raise DataError("logistic regression needs training images of at least two classes.")
    accuracies = {}
    for strength in tqdm(strengths, desc="logistic regression", unit="fit", disable=not progress, leave=False):
        fitted = _fit(train, train_labels, strength)
        accuracies[strength] = float(fitted.score(held_out.double().numpy(), held_out_labels.numpy()))
    best = max(accuracies, key=lambda strength: accuracies[strength])
    final = _fit(torch.cat([train, held_out]), torch.cat([train_labels, held_out_labels]), best)
    return LogisticFit(model=final, strength=best, held_out_accuracy=accuracies)


def _fit(features: Tensor, labels: Tensor, strength: float) -> LogisticRegression:
    model = LogisticRegression(C=strength, tol=TOLERANCE, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a weak penalty needs more steps than the protocol has
        return model.fit(features.double().numpy(), labels.numpy())


def held_back(labels: Tensor, *, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Places of training images to fit, and of those kept back to choose a setting: of each class the same share.

    Source: `split_train_val_datasets` of dinov3/eval/data.py, whose random numbers these are. A class with a single
    image keeps nothing back.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    back = []
    for label in labels.unique().tolist():
        places = shuffled[labels[shuffled] == label]
        back.append(places[: max(1, int(share * len(places))) if len(places) > 1 else 0])
    kept_back = torch.cat(back)
    fits = torch.ones(len(labels), dtype=torch.bool)
    fits[kept_back] = False
    return fits.nonzero().flatten(), kept_back
