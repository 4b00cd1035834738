"""Histograms of norms that add up: the same memory for any number of images, the same bins for every model."""

import numpy as np
import torch
from torch import Tensor

from vitreg_hub.analysis.results import NormHistogram

BINS_PER_OCTAVE = 64
"""A bin is 1.1 % wide."""
SMALLEST, LARGEST = -16, 24
"""Powers of 2 between which norms are told apart; what lies outside is in the first or in the last bin."""
EDGES = np.exp2(np.arange(SMALLEST * BINS_PER_OCTAVE, LARGEST * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE).astype(
    np.float32
)
NUM_BINS = len(EDGES) - 1
CENTERS = np.log2(EDGES[:-1]) + 0.5 / BINS_PER_OCTAVE
"""Middles of the bins, as log2 of the norm."""


def bin_counts(norms: Tensor) -> np.ndarray:
    """Count norms [..., n] per bin, [..., NUM_BINS]. A norm that equals an edge is in the bin below it."""
    inner = torch.from_numpy(EDGES[1:-1]).to(norms.device)
    rows = torch.bucketize(norms.float().contiguous(), inner).flatten(0, -2)
    offsets = torch.arange(len(rows), device=rows.device).unsqueeze(1) * NUM_BINS
    counts = torch.bincount((rows + offsets).flatten(), minlength=len(rows) * NUM_BINS)
    return counts.reshape(*norms.shape[:-1], NUM_BINS).cpu().numpy()


def count_above(counts: np.ndarray, edge: float) -> int:
    """How many norms are greater than an edge of the bins."""
    return int(counts[np.searchsorted(EDGES, np.float32(edge)) :].sum())


def quantiles(counts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    """Norms below which the given shares lie, to the width of a bin, as if norms were spread evenly inside bins."""
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.asarray(shares) * cumulative[-1]
    bins = np.clip(np.searchsorted(cumulative, wanted, side="left") - 1, 0, NUM_BINS - 1)
    inside = (wanted - cumulative[bins]) / np.maximum(counts[bins], 1)
    return [
        float(low * (high / low) ** part) for low, high, part in zip(EDGES[bins], EDGES[bins + 1], inside, strict=True)
    ]


def packed(counts: np.ndarray) -> NormHistogram:
    """Leave out the empty bins at both ends."""
    (filled,) = np.nonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, -1)
    return NormHistogram(first_bin=first, counts=tuple(counts[first : last + 1].tolist()))


def edges(histogram: NormHistogram) -> np.ndarray:
    """Edges of the bins of a histogram, one more than it has counts."""
    return EDGES[histogram.first_bin : histogram.first_bin + len(histogram.counts) + 1]
