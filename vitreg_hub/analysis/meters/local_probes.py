"""Local information: what linear probes find out from a patch token about its own place and pixels."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vitreg_hub.analysis.meters.sampling import MIN_TEST, MIN_TRAIN, NEVER, Sample, hashed, is_test
from vitreg_hub.analysis.results import LocalInformation, LocalProbe
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation

GROUPS = ("normal", "outlier")
POSITION_C = 1.0
"""Inverse L2 penalty of the regression that finds positions, scikit-learn's default. It is fixed: probes are compared
between groups, not tuned for accuracy. On synthetic tokens with a weak position code 0.1 and 10 did no better."""
PIXEL_ALPHAS = tuple(10.0**power for power in range(-2, 7))
"""L2 penalties of the regression that rebuilds pixels; the best on a tenth of the training tokens is taken. No
single one is always right: a small one is enough for thousands of tokens, but overfits as many tokens as channels."""


class LocalProbes:
    """Position and pixel probes on samples of the tokens of the last block after the final norm.

    Tokens of one image in five are for testing. Source: "Vision Transformers Need Registers", arXiv 2309.16588,
    section 2.1; the settings of the probes are unpublished, so these are ours.
    """

    needs = Needs(normed=True)

    def __init__(self, *, train_size: int = 10_000, test_size: int = 5_000, seed: int = 0) -> None:
        """Set how many tokens are kept per group, to fit to and to score on."""
        self._seed = seed
        self._train = {group: Sample(train_size) for group in GROUPS}
        self._test = {group: Sample(test_size) for group in GROUPS}

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        grid, batch = seen.order.grid, len(indices)
        indices, outliers = indices.cpu(), outliers.cpu()
        positions = torch.arange(grid[0] * grid[1])
        priorities = hashed(self._seed, indices[:, None], positions).unflatten(1, grid)
        cells = torch.stack(torch.unravel_index(positions, grid), dim=-1).unflatten(0, grid).expand(batch, *grid, 2)
        columns = (seen.normed.patches.unflatten(1, grid), cells, patch_pixels(seen.images, grid))
        testing = is_test(indices)[:, None]
        for group, members in zip(GROUPS, (~outliers, outliers), strict=True):
            for sample, wanted in ((self._train[group], members & ~testing), (self._test[group], members & testing)):
                sample.add(priorities.where(wanted.unflatten(1, grid), NEVER), *columns)

    def merge(self, other: "LocalProbes") -> None:
        for group in GROUPS:
            self._train[group].merge(other._train[group])
            self._test[group].merge(other._test[group])

    def result(self) -> LocalInformation:
        """Fit and score the probes; those of both groups are fitted to equally many tokens."""
        why_not = {group: _too_few(group, len(self._train[group]), len(self._test[group])) for group in GROUPS}
        groups = [group for group in GROUPS if why_not[group] is None]
        num_train = min((len(self._train[group]) for group in groups), default=0)
        train = {group: _columns(self._train[group], first=num_train) for group in groups}
        probes = {group: probe(train[group], _columns(self._test[group])) for group in groups}
        reasons = [reason for reason in why_not.values() if reason]
        return LocalInformation(
            normal=probes.get("normal"), outlier=probes.get("outlier"), why_not=" ".join(reasons) or None
        )


def patch_pixels(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """View images [B, 3, height, width] as patches [B, rows, columns, 3, patch height, patch width]."""
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    cut = images[:, :, : grid[0] * height, : grid[1] * width]
    return cut.unflatten(3, (grid[1], width)).unflatten(2, (grid[0], height)).permute(0, 2, 4, 1, 3, 5)


def _too_few(group: str, num_train: int, num_test: int) -> str | None:
    if num_train >= MIN_TRAIN and num_test >= MIN_TEST:
        return None
    if not num_train + num_test:
        return f"There are no {group} patches."
    return (
        f"There are too few {group} patches: {num_train} to fit probes to and {num_test} to score them on, "
        f"{MIN_TRAIN} and {MIN_TEST} are needed."
    )


def _columns(sample: Sample, *, first: int | None = None) -> list[np.ndarray]:
    """Tokens [n, D], cells [n, 2] and flat pixels [n, *] of a sample: all, or the first in its random order."""
    return [column[:first].flatten(1).numpy() for column in sample.result()[1:]]


def probe(train: Sequence[np.ndarray], test: Sequence[np.ndarray]) -> LocalProbe:
    """Fit both probes to some tokens and score them on others. Features are standardised by the training tokens."""
    (tokens, cells, pixels), (test_tokens, test_cells, test_pixels) = train, test
    scaler = StandardScaler().fit(tokens)
    features, test_features = np.asarray(scaler.transform(tokens)), np.asarray(scaler.transform(test_tokens))
    found = _found_cells(features, cells, test_features)
    likeliest, nearest = constant_cells(cells)
    return LocalProbe(
        num_train=len(tokens),
        num_test=len(test_tokens),
        position_accuracy=_accuracy(found, test_cells),
        position_distance=_mean_norm(found - test_cells),
        pixel_error=_mean_norm(_rebuilt_pixels(features, pixels, test_features) - test_pixels),
        chance_accuracy=_accuracy(likeliest, test_cells),
        chance_distance=_mean_norm(nearest - test_cells),
        chance_error=_mean_norm(pixels.mean(axis=0, dtype=np.float64) - test_pixels),
    )


def constant_cells(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best constant answers: the most frequent of cells [n, 2], and the cell whose mean distance to them is least.

    The latter need not be one of them, but lies within their bounding box: moving a cell from outside into the box
    brings it closer to all of them.
    """
    places, counts = np.unique(cells, axis=0, return_counts=True)
    (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
    between = np.moveaxis(np.mgrid[top : bottom + 1, left : right + 1], 0, -1).reshape(-1, 2)
    return places[counts.argmax()], between[(euclidean_distances(between, places) @ counts).argmin()]


def _found_cells(features: np.ndarray, cells: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Classify tokens [m, D] into the cells that occur in training, [m, 2]."""
    places, labels = np.unique(cells, axis=0, return_inverse=True)
    if len(places) == 1:
        return places.repeat(len(test_features), axis=0)
    with warnings.catch_warnings():  # it takes few tokens per cell for a mistake
        warnings.filterwarnings("ignore", message="The number of unique classes", category=UserWarning)
        regression = LogisticRegression(C=POSITION_C, max_iter=1000).fit(features, labels.reshape(-1))
    return places[regression.predict(test_features)]


def _rebuilt_pixels(features: np.ndarray, pixels: np.ndarray, test_features: np.ndarray) -> np.ndarray:
    """Predict pixels of tokens [m, D]. In float64: standardised channels of a layer norm are nearly dependent."""
    held_out, fitted = np.split(np.arange(len(features)), [len(features) // 10])
    regression = RidgeCV(alphas=PIXEL_ALPHAS, cv=[(fitted, held_out)], scoring="neg_mean_squared_error")
    return regression.fit(features.astype(np.float64), pixels).predict(test_features)


def _accuracy(found: np.ndarray, cells: np.ndarray) -> float:
    return float((found == cells).all(axis=1).mean())


def _mean_norm(differences: np.ndarray) -> float:
    """Mean L2 norm of vectors [n, *]."""
    return float(np.linalg.norm(differences, axis=1).mean(dtype=np.float64))
