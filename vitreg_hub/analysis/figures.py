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
    Every map has its own colour scale, from the smallest to the largest value that stand below it.

    Args:
        vit: A timm ViT with a class token.
        images: [B, C, H, W], normalised.
        file: PNG to write.
    """
    grid = vit.patch_embed.dynamic_feat_size(images.shape[-2:])
    norms = block_tokens(vit, images)[-1].patches.norm(dim=-1).float().cpu()  # [B, P]
    first_patch = vit.num_prefix_tokens
    attention = (
        attention_maps(vit, images)[-1].mean(dim=1)[:, :first_patch, first_patch:].float().cpu()
    )  # [B, 1 + R, P]
    titles = ["input", "patch norms", "class attention", *(f"register {r}" for r in range(1, first_patch))]

    figure = Figure(figsize=(1.6 * len(titles), 1.75 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image, norm, maps in zip(axes, images, norms, attention, strict=True):
        row[0].imshow(_displayable(image).numpy())
        for axis, values in zip(row[1:], [norm, *maps], strict=True):
            axis.imshow(values.reshape(grid).numpy(), cmap="viridis")
            axis.set_xlabel(f"{values.min():.2g} to {values.max():.2g}", fontsize=7)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(file, dpi=150)
    return Path(file)


def _displayable(image: Tensor) -> Tensor:
    """[C, H, W] of any range -> [H, W, C] in [0, 1]."""
    image = image.float().cpu()
    low, high = torch.aminmax(image)
    return ((image - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0)
