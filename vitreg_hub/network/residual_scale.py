"""A LayerNorm epsilon other than the one that a timm entrypoint fixes, as a scale of the residual stream.

JSON cannot carry an epsilon, and timm has no ViT with the 1e-12 of transformers' ViT and DeiT. A network whose residual
stream is s times larger and whose LayerNorms have epsilon e computes exactly what the network with epsilon e / s^2
computes: the norms divide s out again. With a power of two for s this holds bit for bit, so weights are stored scaled.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import PlainValidator
from timm.layers import LayerScale
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.errors import BundleError

WRITES_TO_STREAM = re.compile(
    r"cls_token|reg_token|dist_token|pos_embed|patch_embed\.proj\.\w+|blocks\.\d+\.(attn\.proj|mlp\.fc2)\.\w+"
)
"""Tensors of a timm ViT that write to the residual stream."""

READS_STREAM = re.compile(r"norm|norm_pre|fc_norm|blocks\.\d+\.norm[12]")
"""Modules that normalise the residual stream, as opposed to the norms inside attention and MLP."""

FAR_BELOW_VARIANCE = 1e-11
"""A tenth of a smaller epsilon makes no difference in float32, unless a token's variance is unusually small (1e-5)."""


def _power_of_two(scale: Any) -> float:
    if type(scale) not in (int, float) or not 0 < scale < 2**64 or math.frexp(scale)[0] != 0.5:
        raise BundleError(f"vitreg.residual_scale must be a positive power of two, not {scale!r}")
    return float(scale)


ResidualScale = Annotated[float, PlainValidator(_power_of_two)]
"""How many times larger a stored residual stream is than the model's: a power of two, as `typed.read` checks."""


def unscaled_epsilon(eps: float, scale: float) -> float:
    """The epsilon for the same outputs as with `eps` and a residual stream that is `scale` times larger."""
    return eps / scale**2


def scaled(state_dict: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Weights of the network whose residual stream is `scale` times larger."""
    if scale == 1:
        return dict(state_dict)
    return {k: tensor * scale if WRITES_TO_STREAM.fullmatch(k) else tensor for k, tensor in state_dict.items()}


def stream_norms(model: nn.Module) -> Iterator[nn.LayerNorm]:
    """Yield the LayerNorms that read the residual stream of a timm ViT."""
    for name, module in model.named_modules():
        if READS_STREAM.fullmatch(name) and isinstance(module, nn.LayerNorm):
            yield module


def can_scale(model: VisionTransformer) -> bool:
    """Whether the residual stream starts at the embeddings, has no LayerScale, and ends in the final norm."""
    has_layer_scale = any(isinstance(module, LayerScale) for module in model.modules())
    return isinstance(model.norm_pre, nn.Identity) and isinstance(model.norm, nn.LayerNorm) and not has_layer_scale


def scale_for(model: nn.Module, *, norm_eps: float) -> float:
    """The scale under which LayerNorms of epsilon `norm_eps` compute what those of a timm ViT do.

    Returns:
        A power of two, 1 where the epsilons are equal. It is found for `norm_eps` over a power of four, and for a tiny
        epsilon within 10 % of that: 1e-12 becomes 1e-6 / 4^10 = 0.954e-12.

    Raises:
        BundleError: There is no such scale.
    """
    found = {norm.eps for norm in stream_norms(model)}
    if found <= {norm_eps}:
        return 1.0
    eps = min(found)
    exponent = round(math.log(norm_eps / eps, 4)) if eps > 0 else 0
    tolerance = 0.1 if eps < FAR_BELOW_VARIANCE else 1e-6
    if len(found) > 1 or not exponent or abs(eps * 4.0**exponent / norm_eps - 1) > tolerance:
        raise BundleError(
            f"the LayerNorms have epsilon {', '.join(map(str, sorted(found)))}, but a bundle of this architecture can "
            f"only have {norm_eps} over a power of four, in all of them."
        )
    return 2.0**exponent
