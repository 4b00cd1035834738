"""Norms of all tokens after every block: the first pass, which shows whether there are outliers."""

import math

import numpy as np

from vitreg_hub.analysis.meters.histogram import EDGES, bin_sums, bins_of, count_above, gap_at, packed, quantiles
from vitreg_hub.analysis.meters.outliers import find_cutoff
from vitreg_hub.analysis.results import QUANTILES, BlockNorms, Cutoff
from vitreg_hub.tokens import Observation, TokenOrder


class NormMeter:
    """Collects L2 norms over channels of every token after every block, before the final norm.

    Darcet et al., section 2.1, look at patch tokens at the output of the last block; they do not say on which side of
    the final norm. After it, all norms are about the square root of the width, so it must be before.
    Means and the number of norms above a given cutoff are exact; quantiles are exact to the width of a histogram's bin.
    """

    def __init__(self, *, cutoff: float | None = None) -> None:
        self.cutoff = cutoff
        self.num_images = 0
        self.order = TokenOrder()
        self.image_size = (0, 0)
        self._counts = np.zeros((), dtype=np.int64)  # [blocks, NUM_BINS]
        self._image_peaks = np.zeros((), dtype=np.int64)  # [blocks, NUM_BINS] of each image's largest patch norm
        self._input_logs = np.zeros(())  # [blocks, NUM_BINS] log2 norms before the first block, summed
        self._above = np.zeros((), dtype=np.int64)  # [blocks] patches above the given cutoff
        self._sums = np.zeros(())  # [blocks, prefix + 1] of each prefix token, and of all patches
        self._smallest = np.full((), np.inf, dtype=np.float32)  # [blocks] patch norms
        self._largest = np.full((), -np.inf, dtype=np.float32)

    def update(self, seen: Observation) -> None:
        """Add a batch that was observed with `norms=True`."""
        first = seen.order.num_prefix
        norms = seen.norms.cpu().numpy()
        by_image = norms[:, :, first:]  # [blocks, B, P]
        patches = by_image.reshape(len(norms), -1)
        inputs = seen.input_norms[:, first:].flatten().cpu().numpy()
        bins = bins_of(patches)
        added = NormMeter(cutoff=self.cutoff)
        added.num_images, added.order = len(seen.images), seen.order
        added.image_size = (seen.images.shape[-2], seen.images.shape[-1])
        added._counts = bin_sums(bins)
        added._image_peaks = bin_sums(bins_of(by_image.max(-1)))
        added._input_logs = bin_sums(bins, np.log2(np.maximum(inputs, EDGES[0])))
        added._above = (patches > (math.inf if self.cutoff is None else self.cutoff)).sum(1)
        prefix_sums = norms[:, :, :first].sum(1, dtype=np.float64)
        added._sums = np.concatenate([prefix_sums, patches.sum(1, dtype=np.float64)[:, None]], axis=1)
        added._smallest, added._largest = patches.min(1), patches.max(1)
        self.merge(added)

    def merge(self, other: "NormMeter") -> None:
        self.num_images += other.num_images
        if other.num_images:
            self.order, self.image_size = other.order, other.image_size
        self._counts = self._counts + other._counts
        self._image_peaks = self._image_peaks + other._image_peaks
        self._input_logs = self._input_logs + other._input_logs
        self._above = self._above + other._above
        self._sums = self._sums + other._sums
        self._smallest = np.minimum(self._smallest, other._smallest)
        self._largest = np.maximum(self._largest, other._largest)

    @property
    def is_finite(self) -> bool:
        """Whether every norm of every token was a finite number."""
        return bool(np.isfinite(self._sums).all())

    def result(self) -> tuple[BlockNorms, ...]:
        """Norms per block. A cutoff that was given holds for all blocks; else every block has its own."""
        return tuple(self._block(i) for i in range(len(self._counts)))

    def _block(self, index: int) -> BlockNorms:
        counts, total = self._counts[index], int(self._counts[index].sum())
        if self.cutoff is None:
            cutoff = find_cutoff(
                counts,
                image_peaks=self._image_peaks[index],
                input_logs=self._input_logs[index],
                patches_per_image=math.prod(self.order.grid),
            )
            outliers = count_above(counts, cutoff.norm)
        else:
            cutoff = Cutoff(value=self.cutoff, source="given", why="given", gap=gap_at(counts, self.cutoff))
            outliers = self._above[index]
        smallest, largest = float(self._smallest[index]), float(self._largest[index])
        inner = [min(max(norm, smallest), largest) for norm in quantiles(counts, QUANTILES)[1:-1]]
        prefix = self._sums[index, :-1] / self.num_images
        return BlockNorms(
            histogram=packed(counts),
            quantiles=(smallest, *inner, largest),
            mean=float(self._sums[index, -1] / total),
            cutoff=cutoff,
            outlier_fraction=float(outliers / total),
            class_norms=tuple(prefix[: self.order.num_class].tolist()),
            register_norms=tuple(prefix[self.order.num_class :].tolist()),
        )
