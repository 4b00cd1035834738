"""Histograms of norms that add up: the same memory for any number of images, the same bins for every model."""

import numpy as np

from vitreg_hub.analysis.results import BINS_PER_OCTAVE, LARGEST, NUM_BINS, SMALLEST, NormHistogram

EDGES = np.exp2(np.arange(SMALLEST * BINS_PER_OCTAVE, LARGEST * BINS_PER_OCTAVE + 1) / BINS_PER_OCTAVE).astype(
    np.float32
)
CENTERS = np.log2(EDGES[:-1]) + 0.5 / BINS_PER_OCTAVE
"""Middles of the bins, as log2 of the norm."""


def bins_of(norms: np.ndarray) -> np.ndarray:
    """Index of each norm's bin; a norm that equals an edge is in the bin below it."""
    norms = np.nan_to_num(norms.astype(np.float32, copy=False))
    # the logarithm is rounded, so it may be off by one bin at an edge; much faster than a binary search
    guess = np.log2(np.maximum(norms, EDGES[0])) * BINS_PER_OCTAVE - SMALLEST * BINS_PER_OCTAVE
    bins = np.clip(guess.astype(np.int64), 0, NUM_BINS - 1)
    bins += (norms > EDGES[bins + 1]) & (bins < NUM_BINS - 1)
    return bins - ((norms <= EDGES[bins]) & (bins > 0))


def bin_sums(bins: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Count what is in each bin, or sum its weights: [rows, n] -> [rows, NUM_BINS]."""
    places = bins + np.arange(len(bins))[:, None] * NUM_BINS
    flat = None if weights is None else np.broadcast_to(weights, bins.shape).ravel()
    return np.bincount(places.ravel(), weights=flat, minlength=len(bins) * NUM_BINS).reshape(len(bins), NUM_BINS)


def count_above(counts: np.ndarray, edge: float) -> int:
    """How many norms are greater than an edge of the bins."""
    return int(counts[np.searchsorted(EDGES, np.float32(edge)) :].sum())


def gap_at(counts: np.ndarray, norm: float) -> tuple[float, float] | None:
    """Upper edge of the last filled bin below a norm and lower edge of the first above; None if a side is empty."""
    (filled,) = np.nonzero(counts)
    below, above = filled[CENTERS[filled] <= np.log2(norm)], filled[CENTERS[filled] > np.log2(norm)]
    return (float(EDGES[below[-1] + 1]), float(EDGES[above[0]])) if len(below) and len(above) else None


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
