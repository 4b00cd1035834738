"""Which norms are outliers: a cutoff that is given, or the valley between two modes; never a percentile."""

import numpy as np

from vitreg_hub.analysis.meters.histogram import CENTERS, EDGES, gap_at
from vitreg_hub.analysis.results import BINS_PER_OCTAVE, Cutoff

MIN_PATCHES = 500
"""With fewer norms, modes cannot be seen."""
SHARES = (0.001, 0.2)
"""Smallest and largest credible share of outliers; the largest also holds within the images that have any."""
MIN_RATIO = 2.0
"""At least how many times the typical norm of the others that of the outliers must be."""
MIN_SEPARATION = 2.0
"""Ashman's D above which two modes are apart (Ashman, Bird and Zepf, 1994, eq. 3)."""
MIN_CONTRAST = 4.0
"""How far the upper mode must rise above the valley, in standard deviations of the two counts."""
MAX_INPUT_SHARE = 0.5
"""How much of the distance between the modes, in log norms, may have been there before the first block."""
WINDOW = BINS_PER_OCTAVE // 4
"""Bins over which counts are summed before modes and valleys are looked for."""


def find_cutoff(
    counts: np.ndarray,
    *,
    image_peaks: np.ndarray | None = None,
    input_logs: np.ndarray | None = None,
    patches_per_image: int = 1,
) -> Cutoff:
    """Find the norm above which patch tokens are outliers, if the norms really have two modes.

    Log norms are divided where the histogram has a valley. The norms on its two sides are taken as two normal
    components, which are two modes if the upper one has 0.1 % to 20 % of the tokens, a typical norm more than twice
    that of the lower one, Ashman's D above 2, and rises above the valley by more than chance. The cutoff is the bottom
    of the deepest such valley. Otherwise there is one mode, and there are no outliers.

    Two modes may also come from the images: a network that was hardly trained gives bright patches larger norms than
    dark ones. So the upper mode must hold few patches of any image that has some, and be made by the network: less
    than half of the distance between the modes may have been there before the first block.

    Args:
        counts: [NUM_BINS] histogram of patch norms (`histogram.py`).
        image_peaks: [NUM_BINS] histogram of the largest patch norm of each image.
        input_logs: [NUM_BINS] of the tokens in each bin, the sum of log2 of their norms before the first block.
    """
    total = int(counts.sum())
    if total < MIN_PATCHES:
        return Cutoff(value=None, source="none", why=f"{total} patch tokens are too few to see modes ({MIN_PATCHES})")
    # every inner edge divides the bins in two; values for edge i + 1 are at index i
    number_low, mean_low, var_low = (part[:-1] for part in _moments(counts, CENTERS))
    number_up, mean_up, var_up = (part[::-1][1:] for part in _moments(counts[::-1], CENTERS[::-1]))
    distance = mean_up - mean_low
    separation = np.sqrt(2) * distance / np.sqrt(var_low + var_up)
    share = number_up / total
    smooth = np.convolve(counts, np.ones(WINDOW, dtype=np.int64), mode="same")
    valley = smooth[1:]
    peak_low, peak_up = np.maximum.accumulate(smooth)[:-1], np.maximum.accumulate(smooth[::-1])[::-1][1:]
    deep = (peak_up - valley > MIN_CONTRAST * np.sqrt(peak_up + valley)) & (2 * valley < np.minimum(peak_up, peak_low))
    apart = (separation > MIN_SEPARATION) & (distance > np.log2(MIN_RATIO))
    fits = deep & apart & (share >= SHARES[0]) & (share <= SHARES[1])
    if not fits.any():
        return Cutoff(value=None, source="none", why="the norms have one mode")
    checks = []
    if image_peaks is not None:
        patches = np.cumsum(image_peaks[::-1])[::-1][1:] * patches_per_image  # of the images with any norm above
        checks.append((number_up <= SHARES[1] * patches, "it fills large parts of few images"))
    if input_logs is not None:
        before_low = np.cumsum(input_logs)[:-1] / np.maximum(number_low, 1)
        before_up = np.cumsum(input_logs[::-1])[::-1][1:] / np.maximum(number_up, 1)
        made_inside = before_up - before_low < MAX_INPUT_SHARE * distance
        checks.append((made_inside, "it is there before the first block already"))
    for holds, objection in checks:
        if not (fits & holds).any():
            above = EDGES[_middle_of_lowest(valley, fits) + 1]
            why = f"the norms have a second mode above {above:.3g}, but {objection}"
            return Cutoff(value=None, source="none", why=why)
        fits = fits & holds
    at = _middle_of_lowest(valley, fits)
    return Cutoff(
        value=float(EDGES[at + 1]),
        source="found",
        why="the norms have two modes",
        separation=float(separation[at]),
        outlier_weight=float(share[at]),
        normal_norm=float(2 ** mean_low[at]),
        outlier_norm=float(2 ** mean_up[at]),
        gap=gap_at(counts, float(EDGES[at + 1])),
    )


def _moments(counts: np.ndarray, centers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number, mean and variance of log norms from the first bin up to each; a bin's own width counts as variance."""
    number = np.cumsum(counts)
    filled = np.maximum(number, 1)
    mean = np.cumsum(counts * centers) / filled
    variance = np.cumsum(counts * centers**2) / filled - mean**2
    return number, mean, np.maximum(variance, 0) + BINS_PER_OCTAVE**-2 / 12


def _middle_of_lowest(values: np.ndarray, among: np.ndarray) -> int:
    """Index in the middle of the longest stretch of the smallest value among those that are marked."""
    low = np.flatnonzero(among & (values == values[among].min()))
    stretches = np.split(low, np.flatnonzero(np.diff(low) > 1) + 1)
    longest = max(stretches, key=len)
    return int(longest[len(longest) // 2])
