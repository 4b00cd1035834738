"""The timm classes that rows of the table build on: one record each, of what differs between them.

Blocks, final norm and patch embedding have the same names in all of them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from timm.models import VisionTransformer, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitreg_hub.arch import REGISTER_INIT_STD, ArchSpec
from vitreg_hub.errors import DataError

STEM = "patch_embed.proj"
"""The convolution that makes patches into tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkKind:
    """One timm class. All names are its attributes, and so its tensors.

    Attributes:
        class_tokens: Tokens before the registers.
        registers: Register tokens; None in a network without any.
        registers_argument: The constructor's argument that counts them.
        positions: The position table; rows of tokens before the patches come first.
        heads: Classifiers, one for each of the class tokens.
        drawn: How the tokens of a new network are drawn: name, torch's initialiser and its standard deviation.
        adapt: timm's filter of weights for a network of another size: state dict and network to state dict.
    """

    timm_class: type[nn.Module]
    class_tokens: tuple[str, ...] = ("cls_token",)
    registers: str = "reg_token"
    registers_argument: str = "reg_tokens"
    positions: str = "pos_embed"
    heads: tuple[str, ...] = ("head",)
    drawn: tuple[tuple[str, str, float], ...]
    adapt: Callable[[dict[str, Tensor], Any], dict[str, Tensor]]

    @property
    def arguments(self) -> frozenset[str]:
        """Names of the constructor's arguments, also those for its base class, without device and dtype."""
        named = [inspect.signature(base.__init__).parameters for base in self.timm_class.__mro__]
        return frozenset().union(*named) - {"self", "args", "kwargs", "device", "dtype"}

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Tensors that are tokens, or are added to tokens."""
        return (self.positions, *self.class_tokens, self.registers)

    @property
    def classifier(self) -> str | tuple[str, ...]:
        """The heads as timm's cfgs name them."""
        return self.heads[0] if len(self.heads) == 1 else self.heads

    def is_of_head(self, name: str) -> bool:
        """Whether a tensor belongs to a head."""
        return name.partition(".")[0] in self.heads

    def num_registers(self, network: nn.Module) -> int:
        """Registers of a network."""
        registers = getattr(network, self.registers)
        return 0 if registers is None else registers.shape[1]

    def num_class_tokens(self, network: nn.Module) -> int:
        """Tokens before the registers of a network, which may have been built without a class token."""
        return cast(int, network.num_prefix_tokens) - self.num_registers(network)


_TOKENS = (("cls_token", "normal_", 1e-6), ("reg_token", "normal_", REGISTER_INIT_STD))  # the first as timm

KINDS = {
    kind.timm_class.__name__: kind
    for kind in (
        NetworkKind(timm_class=VisionTransformer, drawn=_TOKENS, adapt=vision_transformer.checkpoint_filter_fn),
        NetworkKind(
            timm_class=VisionTransformerDistilled,
            class_tokens=("cls_token", "dist_token"),
            heads=("head", "head_dist"),
            drawn=(*_TOKENS, ("dist_token", "trunc_normal_", 0.02)),  # as timm
            adapt=vision_transformer.checkpoint_filter_fn,
        ),
    )
}
"""By the name of the class, which a row's family gives."""


def kind_of(model: ArchSpec | nn.Module) -> NetworkKind:
    """The kind of a row, or of a network of timm.

    Raises:
        DataError: The network is of no class that rows build on.
    """
    if isinstance(model, ArchSpec):
        return KINDS[model.lineage.timm_class]
    for base in type(model).__mro__:
        for kind in KINDS.values():
            if kind.timm_class is base:
                return kind
    raise DataError(f"a {type(model).__name__} is not a network of any architecture: those are {', '.join(KINDS)}.")


def is_registers(name: str) -> bool:
    """Whether a tensor's name is that of registers, whatever stands around its network."""
    return name.rpartition(".")[2] in {kind.registers for kind in KINDS.values()}
