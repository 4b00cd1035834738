"""One view of what happens inside a timm ViT: its tokens by name, block by block, and its attention maps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of one block by name: B images, R registers, P patches, D channels.

    Attributes:
        cls: [B, 1, D] class token; [B, 0, D] without one; [B, 2, D] with a distillation token, which comes second.
        registers: [B, R, D].
        patches: [B, P, D], row by row.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor

    @classmethod
    def split(cls, tokens: Tensor, vit: VisionTransformer) -> Self:
        """Name the tokens [B, N, D] of a model, whose order is class, registers, patches."""
        first_patch = vit.num_prefix_tokens
        first_register = first_patch - vit.num_reg_tokens
        return cls(
            cls=tokens[:, :first_register],
            registers=tokens[:, first_register:first_patch],
            patches=tokens[:, first_patch:],
        )


@torch.no_grad()
def block_tokens(vit: VisionTransformer, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> dict[int, Tokens]:
    """Tokens of the residual stream after chosen blocks, before the final norm.

    Args:
        vit: A timm ViT; nothing of it is changed.
        images: [B, C, H, W].
        blocks: Indices of blocks, negative ones from the end.

    Returns:
        Tokens by block, under the indices that were given.
    """

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output

    with _recorded([vit.blocks[i] for i in blocks], keep) as outputs:
        vit.forward_features(images)
    return {block: Tokens.split(output, vit) for block, output in zip(blocks, outputs, strict=True)}


@torch.no_grad()
def attention_maps(vit: VisionTransformer, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> dict[int, Tensor]:
    """Attention weights of chosen blocks, whichever kernel the model uses.

    Fused kernels never form the matrix, so it is computed once more from the layer's input, for these blocks alone.

    Args:
        vit: A timm ViT; nothing of it is changed.
        images: [B, C, H, W].
        blocks: Indices of blocks, negative ones from the end.

    Returns:
        [B, H, N, N] by block, under the indices that were given; H heads, N tokens: class, registers, patches; every
        row sums to 1.
    """

    def weights(layer: Attention, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        batch, tokens, _ = inputs[0].shape
        qkv = layer.qkv(inputs[0]).reshape(batch, tokens, 3, layer.num_heads, layer.head_dim).permute(2, 0, 3, 1, 4)
        query, key = layer.q_norm(qkv[0]), layer.k_norm(qkv[1])
        return (query * layer.scale @ key.transpose(-2, -1)).softmax(dim=-1)

    with _recorded([vit.blocks[i].attn for i in blocks], weights) as maps:
        vit.forward_features(images)
    return dict(zip(blocks, maps, strict=True))


@contextmanager
def _recorded(modules: Sequence[nn.Module], what: Callable[..., Tensor]) -> Iterator[list[Tensor]]:
    """Collect `what(module, inputs, output)` of every module, in their order; the hooks are gone afterwards."""
    found: list[Tensor] = [torch.empty(0)] * len(modules)

    def hook(index: int) -> Callable[..., None]:
        return lambda module, inputs, output: found.__setitem__(index, what(module, inputs, output))

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
