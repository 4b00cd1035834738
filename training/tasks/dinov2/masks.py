"""Block masks of iBOT: which global crops are masked, how much of each, and where.

Everything follows from the seed, the step and a crop's place in the global batch. So each process draws the masks of
its own crops, and the number of processes changes nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitreg_hub.errors import RecipeError

_PLAN, _MASK = 0x504C414E, 0x4D41534B  # two independent streams of one seed


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMasks:
    """How crops are masked.

    Attributes:
        grid: Rows and columns of patches of a crop.
        probability: Share of masked crops; of N crops exactly int(N * probability) are masked.
        ratio: Smallest and largest share of a masked crop's patches.
        min_patches: Smallest area of a block, in patches, unless fewer remain to be masked.
        max_share: Largest area of a block, as a share of the grid (upstream rounds its half down to whole rows).
        min_aspect: Narrowest block: height by width is between this and its inverse, log-uniform.
        tries: Attempts to place a block before the mask stays smaller than planned.

    Source: dinov2/data/masking.py, dinov2/data/collate.py, dinov2/train/train.py (Apache-2.0); BEiT, arXiv 2106.08254,
    algorithm 1.
    """

    grid: tuple[int, int]
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    min_patches: int = 4
    max_share: float = 0.5
    min_aspect: float = 0.3
    tries: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise RecipeError(f"mask probability is {self.probability}, give a share between 0 and 1.")
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise RecipeError(f"mask ratio is {self.ratio}, give two shares between 0 and 1, the smaller one first.")
        if not 0 < self.min_aspect <= 1:
            raise RecipeError(f"aspect ratio of mask blocks is {self.min_aspect}, give one above 0 and at most 1.")

    def plan(self, num_crops: int, *, seed: int, step: int) -> np.ndarray:
        """Number of patches to mask in each crop of the global batch [num_crops], 0 for those that stay whole.

        The shares of masked crops are spread evenly: `ratio` is divided into equal parts, one for each masked crop.
        """
        rng = _generator(seed, _PLAN, step)
        num_masked = int(num_crops * self.probability)
        edges = np.linspace(*self.ratio, num_masked + 1)
        shares = rng.uniform(edges[:-1], edges[1:])
        targets = np.zeros(num_crops, dtype=np.int64)
        targets[:num_masked] = math.prod(self.grid) * shares
        return rng.permutation(targets)

    def mask(self, target: int, *, seed: int, step: int, position: int, crop: int) -> Tensor:
        """Masked patches of one crop, row by row [rows * columns], bool: `target` of them, or fewer if no block fits.

        The place of the image in the global batch is `position`.
        """
        rng = _generator(seed, _MASK, step, position, crop)
        mask = np.zeros(self.grid, dtype=bool)
        left = target
        while left > 0 and self._add_block(mask, left, rng):
            left = target - int(mask.sum())
        return torch.from_numpy(mask).flatten()

    def _add_block(self, mask: np.ndarray, left: int, rng: np.random.Generator) -> bool:
        """Mask one more block that adds between 1 and `left` patches; False if none was found."""
        rows, columns = self.grid
        most = min(left, self.max_share * rows * columns)
        log_aspect = math.log(self.min_aspect)
        for _ in range(self.tries):
            area = self.min_patches + (most - self.min_patches) * rng.random()
            aspect = math.exp(log_aspect * (1 - 2 * rng.random()))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, side = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
            block = mask[top : top + height, side : side + width]
            if 0 < np.count_nonzero(~block) <= most:
                block[:] = True
                return True
        return False


def masked_indices_and_weights(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Where the masked patches of a batch [B, N] are, and their weights in the loss.

    Returns:
        Indices into the flat batch of B * N patches, ascending [M], and one over the number of masked patches of the
        same crop [M], float32.
    """
    counts = masks.sum(dim=1, keepdim=True).clamp(min=1)
    return masks.flatten().nonzero().flatten(), (1 / counts).expand_as(masks)[masks]


def _generator(seed: int, stream: int, *place: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, *place)))
