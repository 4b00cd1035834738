"""Redundancy: how similar patches are to their neighbours before the network has mixed them."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from vitreg_hub.analysis.results import Redundancy, Similarities
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation

NUM_BINS = 100
"""Bins of the histogram: they divide [-1, 1] equally, and a similarity that equals an edge counts in the bin above."""


def neighbor_similarity(embedded: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity of each patch to its neighbours above, below, left and right, where they exist.

    An embedding of norm 0 has similarity 0 to all. Source: "Vision Transformers Need Registers", arXiv 2309.16588,
    section 2.1.

    Args:
        embedded: [B, P, D] patch embeddings, row by row, before positions are added.
        grid: Rows and columns of patches; more than one patch.

    Returns:
        [B, P] float32.
    """
    per_image = []
    for image in embedded:  # one fits into a processor's cache: several times faster than all at once
        patches = image.float().unflatten(0, grid)
        below = cosine_similarity(patches[:-1], patches[1:], dim=-1)
        right = cosine_similarity(patches[:, :-1], patches[:, 1:], dim=-1)
        neighbors = _over_neighbors(torch.ones_like(below), torch.ones_like(right))
        per_image.append(_over_neighbors(below, right) / neighbors)
    return torch.stack(per_image).flatten(1)


def _over_neighbors(below: Tensor, right: Tensor) -> Tensor:
    """Sum the values of pairs, [rows - 1, columns] and [rows, columns - 1], over the pairs of each patch."""
    return pad(below, (0, 0, 0, 1)) + pad(below, (0, 0, 1, 0)) + pad(right, (0, 1)) + pad(right, (1, 0))


class NeighborSimilarity:
    """Compares patches with their neighbours, normal patches and outliers separately."""

    needs = Needs(embedded=True)

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)  # normal, outlier
        self._counts = torch.zeros(2, NUM_BINS, dtype=torch.int64)

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        if seen.order.grid == (1, 1):
            return  # no patch has a neighbour
        similarities = neighbor_similarity(seen.embedded, seen.order.grid).cpu()
        bins = ((similarities + 1) / 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        outliers = outliers.cpu()
        for group, members in enumerate((~outliers, outliers)):
            self._sums[group] += similarities[members].double().sum()
            self._counts[group] += torch.bincount(bins[members], minlength=NUM_BINS)

    def merge(self, other: "NeighborSimilarity") -> None:
        self._sums += other._sums
        self._counts += other._counts

    def result(self) -> Redundancy:
        """The similarities in both groups; None for a group without patches."""
        return Redundancy(normal=self._group(0), outlier=self._group(1))

    def _group(self, group: int) -> Similarities | None:
        counts = self._counts[group].tolist()
        number = sum(counts)
        if not number:
            return None
        return Similarities(num_patches=number, mean=float(self._sums[group]) / number, counts=tuple(counts))
