"""timm's attention layer and block with transformers' choice of kernel and gradient checkpointing."""

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitreg_hub.compat import wants_attentions


def _eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    weights = (query * scaling @ key.transpose(-2, -1)).softmax(dim=-1)
    attended = nn.functional.dropout(weights, p=dropout, training=module.training) @ value
    return attended.transpose(1, 2), weights


class AttentionKernel(nn.Module):
    """The part of an attention layer that transformers lets users choose. Returns values and, if wanted, weights."""

    is_causal = False  # for transformers' kernels
    gradient_checkpointing = False  # set by transformers, here as in the blocks

    config: PreTrainedConfig  # the model's, set by it

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, dropout: float):
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", _eager_attention)
        attended, weights = attend(self, query, key, value, None, scaling=scaling, dropout=dropout)
        if attend is not _eager_attention and wants_attentions():
            # fused kernels never form the weights; a checkpointed block runs again without a collector
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.gradient_checkpointing):
                weights = (query * scaling @ key.transpose(-2, -1)).softmax(dim=-1)
        return attended, weights


class VitRegAttention(Attention):
    """timm's attention layer with transformers' choice of kernel. No ViT passes a mask, or has a gate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel = AttentionKernel()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        dropout = self.attn_drop.p if self.training else 0.0
        attended, _ = self.kernel(query, key, value, scaling=self.scale, dropout=dropout)
        return self.proj_drop(self.proj(self.norm(attended.reshape(batch, tokens, self.attn_dim))))


class VitRegBlock(GradientCheckpointingLayer, Block):
    """timm's block with transformers' gradient checkpointing."""
