"""Figures that show what a model does with its registers."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.tokens import attention_maps, block_tokens


def token_figure(vit: VisionTransformer, images: Tensor, *, file: str | Path) -> Path:
    """Draw, per image, the input, the norms of its patch tokens and what the class token and the registers attend to.

    Norms are those after the last block, before the final norm; attention is that of the last block, mean over heads.

    Args:
        vit: A timm ViT with a class token.
        images: [B, C, H, W], normalised.
        file: PNG to write.
    """
    grid = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    norms = block_tokens(vit, images)[-1].patches.norm(dim=-1)  # [B, P]
    first_patch = vit.num_prefix_tokens
    attention = attention_maps(vit, images)[-1].mean(dim=1)[:, :first_patch, first_patch:]  # [B, 1 + R, P]
    titles = ["input", "patch norms", "class attention", *(f"register {r}" for r in range(1, first_patch))]

    figure = Figure(figsize=(1.5 * len(titles), 1.6 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image, norm, maps in zip(axes, images, norms, attention, strict=True):
        shown = [_displayable(image), norm.reshape(grid), *maps.reshape(-1, *grid)]
        for axis, picture, title in zip(row, shown, titles, strict=True):
            axis.imshow(picture.numpy(), cmap="viridis")
            axis.set_axis_off()
            if row is axes[0]:
                axis.set_title(title, fontsize=9)
    figure.savefig(file, dpi=150)
    return Path(file)


def _displayable(image: Tensor) -> Tensor:
    """[C, H, W] of any range -> [H, W, C] in [0, 1]."""
    low, high = torch.aminmax(image)
    return ((image - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0)
