"""LOST: the box of one object without labels, and CorLoc, the share of images where such a box is right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from vitreg_hub.errors import DataError

K_PATCHES = 100
"""Patches among which LOST looks for those that are like its seed."""
LEAST_OVERLAP = 0.5
"""Intersection over union from which on a box is right."""

Boxes = Sequence[Any] | np.ndarray | Tensor
"""Boxes [K, 4]: left, top, right and bottom edge in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LostBox:
    """What LOST finds in one image.

    Attributes:
        seed: The patch that is like the fewest others, counted row by row.
        expanded: Patches that are like the seed, in ascending order; usually with the seed itself.
        box: Left, top, right and bottom edge in pixels; right and bottom lie outside.
    """

    seed: int
    expanded: tuple[int, ...]
    box: tuple[float, float, float, float]


def lost_box(
    features: Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
    k_patches: int = K_PATCHES,
    bias: float = 0.0,
) -> LostBox:
    """Find the box of one object by what the patches of an image have in common.

    Objects are taken to cover fewer patches than the background: the seed is the patch whose features have a positive
    product with the fewest others; it is joined by those of the `k_patches` next ones that have one with it; the box
    holds the connected patches around the seed whose summed products with all of these are positive.

    Source: valeoai/LOST, object_discovery.py, which leaves to chance which of equal patches comes first; here it is
    the first. The bias is that of the registers paper, which has no official code.

    Args:
        features: [P, D], row by row; of official runs the keys of the last block, not normalised.
        grid: Rows and columns of patches.
        patch_size: Side, or height and width, of a patch in pixels.
        image_size: Height and width of the image in pixels, before it was padded.
        k_patches: Patches with the fewest relations, among which the seed's fellows are.
        bias: Added to every product, so that products count as positive from `-bias` on.

    Returns:
        The box. Where no patch is like the seed, not even itself (under a bias far below zero, where the official code
        would stop), it holds the seed alone.

    Raises:
        DataError: The grid has another number of patches than there are features, or no patch is to be looked at.
    """
    if features.ndim != 2 or len(features) != grid[0] * grid[1] or k_patches < 1:
        raise DataError(
            f"a grid of {grid[0]} x {grid[1]} patches with features {list(features.shape)} and k_patches {k_patches} "
            "gives no box: give features [P, D] of all P patches, and at least 1 patch."
        )
    products = features @ features.T
    return box_of_products(
        products, grid=grid, patch_size=patch_size, image_size=image_size, k_patches=k_patches, bias=bias
    )


def box_of_products(
    products: Tensor,
    *,
    grid: tuple[int, int],
    patch_size: int | tuple[int, int],
    image_size: tuple[int, int],
    k_patches: int = K_PATCHES,
    bias: float = 0.0,
) -> LostBox:
    """`lost_box` from the products [P, P] of features, which several biases can share; they are left as they are."""
    relations = _relations(products, above=-bias)
    nearest = relations.argsort(stable=True)[:k_patches]
    seed = int(nearest[0])
    expanded = nearest[products[seed, nearest] + bias > 0]
    rows = products[expanded]
    summed = (rows.add_(bias) if bias else rows).sum(dim=0).reshape(grid).float()
    mask = (summed > 0).cpu().numpy()
    place = divmod(seed, grid[1])
    if not mask[place]:
        mask[:] = False
        mask[place] = True
    components = cast(tuple[np.ndarray, int], ndimage.label(mask))[0]  # joined by edges, not by corners
    rows_and_columns = ndimage.find_objects(components, max_label=components[place])[-1]
    steps = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    (top, bottom), (left, right) = (
        (float(step * part.start), float(min(step * part.stop, side)))
        for part, step, side in zip(rows_and_columns, steps, image_size, strict=True)
    )
    return LostBox(seed=seed, expanded=tuple(sorted(expanded.tolist())), box=(left, top, right, bottom))


def _relations(products: Tensor, *, above: float) -> Tensor:
    """With how many others each patch has a product above a number [P]."""
    if products.device.type == "cpu" and products.dtype == torch.float32:  # torch sums ten times slower
        bits = np.packbits(products.detach().numpy() > np.float32(above), axis=1)
        counts = torch.from_numpy(np.bitwise_count(bits).sum(axis=1, dtype=np.int64))
    else:
        counts = (products > above).sum(dim=1)
    return counts - (products.diagonal() > above).to(counts.dtype)


def found(boxes: Boxes, ground_truth: Sequence[Boxes | None]) -> np.ndarray:
    """Whether each image's box is right: at least half of its union with any true box of the image is common.

    Source: valeoai/LOST, main_lost.py and datasets.py (`bbox_iou`, in float32).

    Args:
        boxes: [N, 4], one of each image.
        ground_truth: Boxes [K, 4] of each image, None or none where nothing is known.

    Returns:
        [N] 1 or 0, and not a number where there is no true box, as official runs leave such images out.

    Raises:
        DataError: There are more boxes than images, or fewer.
    """
    if len(boxes) != len(ground_truth):
        raise DataError(f"{len(boxes)} boxes for {len(ground_truth)} images: give one for each.")
    hits = np.full(len(boxes), np.nan)
    for i, (box, truths) in enumerate(zip(boxes, ground_truth, strict=True)):
        if truths is not None and len(truths):
            overlaps = box_iou(_corners([box]), _corners(truths))
            hits[i] = float(overlaps.max() >= LEAST_OVERLAP)
    return hits


def _corners(boxes: Any) -> Tensor:
    return torch.as_tensor(np.asarray(boxes, dtype=np.float32)).reshape(-1, 4)


def corloc(boxes: Boxes, ground_truth: Sequence[Boxes | None]) -> float:
    """The share in [0, 1] of images whose box is right; arguments and source as of `found`.

    Raises:
        DataError: As of `found`, or no image has a true box.
    """
    return share_found(found(boxes, ground_truth))


def share_found(hits: np.ndarray) -> float:
    """The share of images that have true boxes, of what `found` says of each.

    Raises:
        DataError: No image has any.
    """
    known = ~np.isnan(hits)
    if not known.any():
        raise DataError("no image has a true box, so nothing says where objects are: give images with boxes.")
    return float(hits[known].mean())
