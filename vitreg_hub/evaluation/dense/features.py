"""Maps of features: what a frozen ViT's patches hold, as a linear head reads them."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.maps import resized
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.tokens import observe

Fit = Literal["pad", "resize", "cut"]
"""What is done to images that the patch does not divide."""


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a ViT's patches in pixels."""
    down, right = VitLayout.of(model).embedding.stride
    return int(down), int(right)


def fitted(images: Tensor, patch: tuple[int, int], *, fit: Fit) -> Tensor:
    """Make the sides of images [B, 3, H, W] multiples of the patch.

    Source: "pad" is CenterPadding of DINOv2 and of DINOv3's depth: zeros, the smaller half to the left and at the top.
    "resize" goes to the next multiples. "cut" leaves out what is too much at the right and the bottom, as
    DINOv3's network does, whose segmentation does not pad.
    """
    size = tuple(images.shape[-2:])
    if fit == "cut":
        return images[..., : size[0] // patch[0] * patch[0], : size[1] // patch[1] * patch[1]]
    wanted = tuple(math.ceil(side / step) * step for side, step in zip(size, patch, strict=True))
    if wanted == size:
        return images
    if fit == "resize":
        return resized(images, (wanted[0], wanted[1]))
    down, right = wanted[0] - size[0], wanted[1] - size[1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def dense_features(
    model: nn.Module,
    images: Tensor,
    *,
    blocks: Sequence[int] = (-1,),
    normed: bool = True,
    use_cls: bool = False,
    use_registers: bool = False,
    fit: Fit = "pad",
) -> Tensor:
    """Features [B, C, rows, columns] of a frozen ViT's patches, in float32.

    Args:
        model: A ViT of timm or transformers. It is not changed, and no gradients are kept.
        images: [B, 3, H, W], preprocessed.
        blocks: Blocks whose tokens are concatenated, in this order; negative indices count from the end.
        normed: Whether each passes through the final norm, as DINOv3's heads and DINOv2's for segmentation read them
            (DINOv2's published heads for depth do not).
        use_cls: Follow each block's patches by its class token, the same at every place.
        use_registers: Follow them by the mean of the registers.
        fit: What is done to images that the patch does not divide, see `fitted`.

    Raises:
        DataError: The model cannot be read, or has no such block, class token or registers.
    """
    images = fitted(images, patch_size(model), fit=fit)
    seen = observe(model, images, normed_blocks=blocks) if normed else observe(model, images, blocks=blocks)
    for wanted, number, what in (
        (use_cls, seen.order.num_class, "class token"),
        (use_registers, seen.order.num_registers, "registers"),
    ):
        if wanted and not number:
            raise DataError(f"the model has no {what}, so leave use_{'cls' if what == 'class token' else what} out.")
    parts = []
    for block in blocks:
        tokens = (seen.normed_blocks if normed else seen.tokens)[block]
        parts.append(tokens.patches)
        if use_cls:
            parts.append(tokens.cls[:, :1].expand_as(tokens.patches))
        if use_registers:
            parts.append(tokens.registers.mean(dim=1, keepdim=True).expand_as(tokens.patches))
    return torch.cat(parts, dim=2).transpose(1, 2).unflatten(2, seen.order.grid).float()
