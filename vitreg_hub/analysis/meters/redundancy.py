"""Redundancy: how much patches are like their neighbours, before the network has mixed them."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from vitreg_hub.analysis.results import Redundancy, Similarities
from vitreg_hub.passes import Needs
from vitreg_hub.tokens import Observation

NUM_BINS = 100
"""Bins of the histogram: they divide [-1, 1] equally, and a similarity that equals an edge counts in the bin above."""


def neighbor_similarity(embedded: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity of each patch to its neighbours: above, below, left and right, as far as they exist.

    An embedding of norm 0 has similarity 0 to all. Source: "Vision Transformers Need Registers", arXiv 2309.16588,
    section 2.1.

    Args:
        embedded: [B, P, D] patch embeddings, row by row, before positions are added.
        grid: Rows and columns of patches; more than one patch.

    Returns:
        [B, P] float32.
    """
    pairs = [  # image by image, which fits into a processor's cache: several times faster than all at once
        (
            cosine_similarity(patches[:-1], patches[1:], dim=-1),
            cosine_similarity(patches[:, :-1], patches[:, 1:], dim=-1),
        )
        for patches in (image.float().unflatten(0, grid) for image in embedded)
    ]
    below, right = (torch.stack(similarities) for similarities in zip(*pairs, strict=True))
    total = _over_neighbors(below, right)
    return (total / _over_neighbors(torch.ones_like(below), torch.ones_like(right))).flatten(1)


def _over_neighbors(below: Tensor, right: Tensor) -> Tensor:
    """Sum what belongs to pairs [B, rows - 1, columns] and [B, rows, columns - 1] over the pairs of each patch."""
    return pad(below, (0, 0, 0, 1)) + pad(below, (0, 0, 1, 0)) + pad(right, (0, 1)) + pad(right, (1, 0))


class NeighborSimilarity:
    """Likeness to neighbours over a stream of images, normal patches against outliers."""

    needs = Needs(embedded=True)

    def __init__(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64)  # normal, outlier
        self._counts = torch.zeros(2, NUM_BINS, dtype=torch.int64)

    def update(self, seen: Observation, indices: Tensor, labels: Tensor | None, outliers: Tensor) -> None:
        """Add one batch.

        Args:
            seen: With `embedded`.
            indices: [B] of the images in the data set; not needed.
            labels: [B] or None; not needed.
            outliers: [B, P] which patches are outliers.
        """
        if seen.order.grid == (1, 1):
            return  # no patch has a neighbour
        similarities = neighbor_similarity(seen.embedded, seen.order.grid).cpu()
        bins = ((similarities + 1) / 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        outliers = outliers.cpu()
        for group, members in enumerate((~outliers, outliers)):
            self._sums[group] += similarities[members].double().sum()
            self._counts[group] += torch.bincount(bins[members], minlength=NUM_BINS)

    def merge(self, other: "NeighborSimilarity") -> None:
        """Add what another process saw."""
        self._sums += other._sums
        self._counts += other._counts

    def result(self) -> Redundancy:
        """What was seen so far; None for a group without patches."""
        normal, outlier = (_similarities(float(s), c) for s, c in zip(self._sums, self._counts, strict=True))
        return Redundancy(normal=normal, outlier=outlier)


def _similarities(total: float, counts: Tensor) -> Similarities | None:
    num_patches = int(counts.sum())
    if not num_patches:
        return None
    return Similarities(num_patches=num_patches, mean=total / num_patches, counts=tuple(counts.tolist()))
