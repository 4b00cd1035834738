"""Rules: how one lineage names and shapes the tensors of a ViT, as data that can be read in both directions.

A rule pairs a template of the lineage's names with a template of timm's. `{i}` stands for the number of a block, `{n}`
for 1 or 2, `{x}` for weight or bias, `{rest}` for anything.
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDERS = {"{i}": "(0|[1-9][0-9]{0,3})", "{n}": "([12])", "{x}": "(weight|bias)", "{rest}": "(.+)"}


class Reshape(enum.Enum):
    """How a tensor's shape differs; D channels, N rows, E outputs."""

    SAME = "as it is"
    TRANSPOSE = "[D, E] for timm's [E, D]"
    TOKEN = "[D] for timm's [1, 1, D]"
    TABLE = "[N, D] for timm's [1, N, D]"

    @property
    def dims(self) -> int | None:
        """Dimensions that the lineage's tensor must have, None for any."""
        return {Reshape.TRANSPOSE: 2, Reshape.TOKEN: 1, Reshape.TABLE: 2}.get(self)

    def timm_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """timm's shape of a tensor that has this one in the lineage."""
        if self is Reshape.TRANSPOSE:
            return shape[::-1]
        return {Reshape.TOKEN: (1, 1), Reshape.TABLE: (1,)}.get(self, ()) + shape

    def to_timm(self, tensor: Tensor) -> Tensor:
        """The lineage's tensor in timm's shape."""
        return tensor.T if self is Reshape.TRANSPOSE else tensor.reshape(self.timm_shape(tuple(tensor.shape)))

    def from_timm(self, tensor: Tensor) -> Tensor:
        """timm's tensor in the lineage's shape."""
        if self is Reshape.TRANSPOSE:
            return tensor.T
        return tensor if self.dims is None else tensor.flatten(0, tensor.ndim - self.dims)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", template)
    return re.compile("".join(PLACEHOLDERS.get(piece) or re.escape(piece) for piece in pieces))


def _translated(name: str, old: str, new: str) -> str | None:
    """A name that fits the old template, in the form of the new one; None if it does not fit."""
    found = _pattern(old).fullmatch(name)
    if found is None:
        return None
    values = iter(found.groups())
    return re.sub(r"\{\w+\}", lambda _: next(values), new)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One kind of tensor.

    Attributes:
        take: Template of the lineage's name.
        give: Template of timm's name, with the same placeholders in the same order; "" drops the tensor.
        part: (k, n): the tensor is the k-th of n that timm concatenates along the first dimension.
        swiglu: Whether only networks with a SwiGLU MLP use this name; others then have another rule for it.
    """

    take: str
    give: str = ""
    why: str = ""
    reshape: Reshape = Reshape.SAME
    part: tuple[int, int] = (0, 1)
    swiglu: bool = False

    def timm_name(self, name: str) -> str | None:
        """timm's name of a tensor of the lineage, "" if it is dropped, None where the rule is about another."""
        return _translated(name, self.take, self.give)

    def lineage_name(self, timm_name: str) -> str | None:
        """The lineage's name of a tensor of timm's, None where the rule is about another."""
        return _translated(timm_name, self.give, self.take)


def keep(take: str, give: str | None = None, **others: Any) -> Rule:
    """A tensor that timm has, by default under the same name; the others are fields of the rule."""
    return Rule(take=take, give=give or take, **others)


def same(*names: str) -> tuple[Rule, ...]:
    """Tensors that timm has under the same names."""
    return tuple(keep(name) for name in names)


def drop(*names: str, why: str) -> tuple[Rule, ...]:
    """Tensors that timm has no place for."""
    return tuple(Rule(take=name, why=why) for name in names)


def qkv(layer: str, query: str, key: str, value: str) -> tuple[Rule, ...]:
    """Three projections within a layer that timm holds as one."""
    names = enumerate((query, key, value))
    return tuple(keep(f"{layer}.{name}.{{x}}", "blocks.{i}.attn.qkv.{x}", part=(k, 3)) for k, name in names)
