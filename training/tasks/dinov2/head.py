"""The head of DINO and iBOT: what a token says about each of K prototypes."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreg_hub.training.tasks.dinov2.settings import Head


class DinoHead(nn.Module):
    """An MLP to a bottleneck of unit length, and its products with prototypes of length `weight_g`.

    The MLP's batch norm, which upstream offers and no published run uses, is left out. Names of parameters are
    upstream's, so that official heads load strictly.

    Source: dinov2/layers/dino_head.py (Apache-2.0); DINO, arXiv 2104.14294, appendix C.
    """

    def __init__(self, width: int, head: Head, *, bias: bool = True) -> None:
        """Draw the weights for tokens of so many channels; `bias` is that of the MLP, the last layer has none."""
        super().__init__()
        widths = [width, *(head.hidden for _ in range(head.layers - 1)), head.bottleneck]
        linears = [nn.Linear(width, next_width, bias=bias) for width, next_width in pairwise(widths)]
        for linear in linears:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            layers += [nn.GELU(), linear]
        self.mlp = nn.Sequential(*layers) if head.layers > 1 else linears[0]
        self.last_layer = _Prototypes(head.bottleneck, head.prototypes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [..., K] of tokens [..., D]."""
        return self.last_layer(F.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-12))


class _Prototypes(nn.Module):
    """A linear layer with weight norm whose parameters are plain.

    torch's parametrisation would compute the same, but it renames the parameters and replaces the module's class, which
    would complicate sharding and copying.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Linear(in_dim, out_dim, bias=False).weight  # initialised like an ordinary linear layer

    def forward(self, x: Tensor) -> Tensor:
        # float32 even if sharding provides bfloat16 parameters, whose type the large product keeps
        weight = F.normalize(self.weight_v.float(), dim=1) * self.weight_g.float()
        dtype = self.weight_v.dtype
        return F.linear(x.to(dtype), weight.to(dtype))
