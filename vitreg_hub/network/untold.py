"""What JSON cannot tell plain timm about a network: one ordered list for all code that reads, writes and builds.

A bundle's weights are stored for the network that plain timm builds. Each entry of `UNTOLD` is a fact that this network
misses: how `vitreg` in config.json stores it, how it is applied, and what a card says of plain timm without it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.arch import ArchSpec
from vitreg_hub.network.positions import TIMM_RULE, PositionRule, follow, rule_of
from vitreg_hub.network.residual_scale import can_scale, scale_for, scaled, stream_norms, unscaled_epsilon


class Untold:
    """One fact about a network. Methods that a subclass does not define change nothing.

    Attributes:
        key: Its key in config.json, and its field of `BundleConfig`.
        default: The value that plain timm has, which is not stored.
    """

    key: str
    default: Any

    def to_json(self, value: Any) -> Any:
        """The value as config.json holds it."""
        return value

    def found_in(self, model: nn.Module, spec: ArchSpec) -> Any:
        """The value of a timm model that is to be stored as a row.

        Raises:
            BundleError: There is none.
        """
        raise NotImplementedError

    def problem(self, network: VisionTransformer, value: Any) -> str | None:
        """Why a network of plain timm cannot have the value; None if it can."""

    def apply(self, network: VisionTransformer, value: Any) -> None:
        """Apply the value to a network of plain timm that keeps its weights as they are stored.

        Raises:
            BundleError: The network cannot have it.
        """

    def stored(self, weights: Mapping[str, Tensor], value: Any) -> Mapping[str, Tensor]:
        """Weights of the model itself, as they are stored."""
        return weights

    def resolve(self, network: VisionTransformer, weights: Mapping[str, Tensor], value: Any) -> Mapping[str, Tensor]:
        """Change a network of plain timm and stored weights back into the model itself; returns its weights."""
        self.apply(network, value)
        return weights

    def stored_tokens(self, tokens: Tensor, value: Any) -> Tensor:
        """The residual stream [B, N, D] of the model itself, as a network with stored weights has it."""
        return tokens

    def own_tokens(self, tokens: Tensor, value: Any) -> Tensor:
        """The residual stream [B, N, D] of a network with stored weights, as the model itself has it."""
        return tokens

    def limits(self, value: Any) -> str | None:
        """What a card says of the value; None if there is nothing to say."""


class _Positions(Untold):
    """How the position table is resampled: timm has a rule of its own."""

    key, default = "positions", TIMM_RULE

    def to_json(self, value: PositionRule) -> dict[str, Any]:
        return dataclasses.asdict(value)

    def found_in(self, model: nn.Module, spec: ArchSpec) -> PositionRule:
        return rule_of(model)

    def apply(self, network: VisionTransformer, value: PositionRule) -> None:
        follow(network, value)

    def limits(self, value: PositionRule) -> str:
        said = "For other sizes, positions are resampled by bicubic interpolation"
        if value == TIMM_RULE:
            return f"{said} with antialiasing, as timm does."
        offset = f" and with an offset of {value.offset:g} patches" if value.offset else ""
        same = "; a grid of as many patches keeps them" if value.keep_equal_count else ""
        return (
            f"{said} {'with' if value.antialias else 'without'} antialiasing{offset}{same}, as its lineage does. Plain "
            "timm and plain transformers do it in timm's way, vitreg_hub's `AutoModel` and `ModelBundle.build` in the "
            "lineage's."
        )


class _ResidualScale(Untold):
    """How many times larger the residual stream is stored, for another epsilon than timm's entrypoint has."""

    key, default = "residual_scale", 1.0

    def found_in(self, model: nn.Module, spec: ArchSpec) -> float:
        return scale_for(model, norm_eps=spec.lineage.norm_eps)

    def problem(self, network: VisionTransformer, value: float) -> str | None:
        if value == 1 or can_scale(network):
            return None
        return "vitreg.residual_scale needs a network without norm_pre and LayerScale, and with a final norm"

    def stored(self, weights: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
        return scaled(weights, value)

    def resolve(self, network: nn.Module, weights: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
        for norm in stream_norms(network):
            norm.eps = unscaled_epsilon(norm.eps, value)
        return scaled(weights, 1 / value)

    def stored_tokens(self, tokens: Tensor, value: float) -> Tensor:
        return tokens if value == 1 else tokens * value

    def own_tokens(self, tokens: Tensor, value: float) -> Tensor:
        return tokens if value == 1 else tokens / value

    def limits(self, value: float) -> str | None:
        if value == 1:
            return None
        return (
            f"Its residual stream is stored {value:,g} times larger, which brings LayerNorm's epsilon close to its "
            "source's. In plain timm and plain transformers, tokens between the blocks are larger by that and float16 "
            "can overflow: use float32 or bfloat16 there, and fine-tune the model of `ModelBundle.build`."
        )


UNTOLD: tuple[Untold, ...] = (_Positions(), _ResidualScale())
