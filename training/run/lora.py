"""Low-rank changes of a network's matrices, which are merged into them in the copy that is evaluated and published."""

import math
from typing import cast

from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrize

MATRICES = ("attn.qkv", "attn.proj")
"""The matrices of a block that get one. Source: Hu et al., LoRA, section 4.2, which adapts the attention alone."""


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a matrix [out, in]; it begins with 0.

    Source: Hu et al., LoRA (arXiv:2106.09685), section 4.1, with a scale of 1; peft/tuners/lora/layer.py (how it
    begins).
    """

    def __init__(self, like: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(like.new_empty(rank, like.shape[1]))
        self.up = nn.Parameter(like.new_zeros(like.shape[0], rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed matrix."""
        return weight + self.up @ self.down


def add_low_rank(model: VisionTransformer, rank: int) -> None:
    """Let the attention's matrices of every block change by a product of this rank; all else is frozen."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name in MATRICES:
            layer = cast(nn.Linear, block.get_submodule(name))
            change = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", change)


def merge_low_rank(module: nn.Module) -> nn.Module:
    """Let a module have plain matrices, with their changes in them; returns it."""
    for name, layer in list(module.named_modules()):
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer, nn.Linear):
            # torch's own removal would change the class that copies of the layer share
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
            module.set_submodule(name, plain)
    return module
