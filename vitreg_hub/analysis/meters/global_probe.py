"""Global information: how well an image is classified from one of its tokens alone."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vitreg_hub.analysis.meters.sampling import MIN_TEST, MIN_TRAIN, NEVER, Sample, hashed, is_test
from vitreg_hub.analysis.results import GlobalInformation, TokenAccuracy
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation, TokenOrder

INVERSE_PENALTIES = tuple(10.0**power for power in range(2, -5, -1))
"""Values of scikit-learn's C. The best on a tenth of the training images is taken; of equally good ones the largest,
since the smallest may hardly outweigh the intercepts. DINOv2's eval/log_regression.py tries 45 from 1e-6 to 1e5."""
NORMAL, OUTLIER = "normal patch", "outlier patch"
_BOTH = torch.iinfo(torch.int64).min
"""Added to the priorities of images that have an outlier and a normal patch, so that they come before all others."""


class TokenClassification:
    """Logistic regression on one token per image, of the last block after the final norm.

    The tokens are the class token, one normal and one outlier patch chosen at random, and each register. One image
    in five is for testing. If enough images have both a normal patch and an outlier, only these are used, so that all
    tokens are judged on the same images; otherwise all images are used, and no outlier. Source: "Vision Transformers
    Need Registers", arXiv 2309.16588, section 2.1.
    """

    needs = Needs(normed=True)

    def __init__(self, *, train_size: int = 4_000, test_size: int = 2_000, seed: int = 0) -> None:
        """Set how many images are kept, to fit to and to score on."""
        self._seed = seed
        self._train, self._test = Sample(train_size), Sample(test_size)
        self._order = TokenOrder()
        self._unlabelled = False

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        self._order = seen.order
        if labels is None:
            self._unlabelled = True
            return
        indices, outliers = indices.cpu(), outliers.cpu()
        tokens = seen.normed
        normal, outlier = (self._one_of(tokens.patches, members, indices) for members in (~outliers, outliers))
        features = torch.cat([tokens.cls, normal, outlier, tokens.registers], dim=1)
        usable, has_outlier = (~outliers).any(dim=1) & (labels.cpu() >= 0), outliers.any(dim=1)
        priorities = hashed(self._seed, indices)
        priorities = (priorities + _BOTH).where(has_outlier, priorities).where(usable, NEVER)
        testing = is_test(indices)
        self._train.add(priorities.where(~testing, NEVER), features, labels)
        self._test.add(priorities.where(testing, NEVER), features, labels)

    def merge(self, other: "TokenClassification") -> None:
        self._train.merge(other._train)
        self._test.merge(other._test)
        self._order = self._order if other._order == TokenOrder() else other._order
        self._unlabelled |= other._unlabelled

    def result(self) -> GlobalInformation:
        """Fit and score a regression per token."""
        if self._unlabelled:
            return _nothing("The images have no labels.")
        if len(self._train) < MIN_TRAIN or len(self._test) < MIN_TEST:
            return _nothing(
                f"There are too few images: {len(self._train)} to fit regressions to and {len(self._test)} to score "
                f"them on, {MIN_TRAIN} and {MIN_TEST} are needed."
            )
        train, test = self._train.result(), self._test.result()
        num_train, num_test = (int((priorities < 0).sum()) for priorities, *_ in (train, test))
        why_not = _too_few_with_both(num_train, num_test)
        if why_not is None:
            train, test = [column[:num_train] for column in train], [column[:num_test] for column in test]
        (_, tokens, labels), (_, test_tokens, test_labels) = (
            [column.numpy() for column in columns] for columns in (train, test)
        )
        if len(np.unique(labels[_split(len(labels))[0]])) < 2:
            return _nothing("The images to fit regressions to are of one class.")
        classes, counts = np.unique(labels, return_counts=True)
        names = [*self._order.class_names, NORMAL, OUTLIER, *self._order.register_names]  # in the order of `update`
        return GlobalInformation(
            tokens=tuple(
                TokenAccuracy(token=name, accuracy=_accuracy(tokens[:, i], labels, test_tokens[:, i], test_labels))
                for i, name in enumerate(names)
                if not (name == OUTLIER and why_not)
            ),
            num_classes=len(np.unique(test_labels)),
            num_train=len(labels),
            num_test=len(test_labels),
            chance=float((test_labels == classes[counts.argmax()]).mean()),
            why_not=why_not,
        )

    def _one_of(self, patches: Tensor, members: Tensor, indices: Tensor) -> Tensor:
        """Choose one of the members among patches [B, P, D] of each image at random, [B, 1, D]; any if it has none."""
        priorities = hashed(self._seed, indices[:, None], torch.arange(patches.shape[1]))
        chosen = priorities.where(members, NEVER).argmin(dim=1)
        return patches[torch.arange(len(patches)), chosen].unsqueeze(1)


def _nothing(why_not: str) -> GlobalInformation:
    return GlobalInformation(tokens=(), num_classes=0, num_train=0, num_test=0, chance=None, why_not=why_not)


def _too_few_with_both(num_train: int, num_test: int) -> str | None:
    if num_train >= MIN_TRAIN and num_test >= MIN_TEST:
        return None
    if not num_train + num_test:
        return "No image has both an outlier and a normal patch."
    return (
        f"Too few images have both an outlier and a normal patch: {num_train} to fit and {num_test} to score, "
        f"{MIN_TRAIN} and {MIN_TEST} are needed."
    )


def _split(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of images in random order: those to fit a penalty to, and those to judge it on."""
    places = np.arange(num)
    return places[places % 10 != 0], places[places % 10 == 0]


def _accuracy(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray) -> float:
    """Choose the best penalty, fit a regression to all tokens [n, D] and score it on the test tokens."""
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": INVERSE_PENALTIES},
        cv=[_split(len(labels))],
    )
    with warnings.catch_warnings():  # under weak penalties some stop at the last iteration, as DINOv2's do
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(features, labels)
    return float((search.predict(test_features) == test_labels).mean())
