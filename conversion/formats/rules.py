"""Rules: how one lineage names and shapes the tensors of a ViT, as data that reads in both directions.

A rule pairs a template of the lineage's names with a template of timm's. `{i}` stands for the number of a block, `{x}`
for weight or bias, `{rest}` for anything.
"""

import enum
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vitreg_hub.network.positions import TIMM_RULE, PositionRule

PLACEHOLDERS = {"{i}": "(0|[1-9][0-9]{0,3})", "{x}": "(weight|bias)", "{rest}": "(.+)"}
WHOLE = (0, 1)


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

    @property
    def _ones(self) -> int:
        """Dimensions of size 1 that timm's tensor has before the lineage's."""
        return {Reshape.TOKEN: 2, Reshape.TABLE: 1}.get(self, 0)

    def timm_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """timm's shape of a tensor that has this one in the lineage."""
        return shape[::-1] if self is Reshape.TRANSPOSE else (1,) * self._ones + shape

    def to_timm(self, tensor: Tensor) -> Tensor:
        """The lineage's tensor in timm's shape."""
        if self is Reshape.TRANSPOSE:
            return tensor.T
        return tensor[(None,) * self._ones]

    def from_timm(self, tensor: Tensor) -> Tensor:
        """timm's tensor in the lineage's shape."""
        if self is Reshape.TRANSPOSE:
            return tensor.T
        for _ in range(self._ones):
            tensor = tensor.squeeze(0)
        return tensor


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", template)
    return re.compile("".join(PLACEHOLDERS.get(piece) or re.escape(piece) for piece in pieces))


def _fill(template: str, values: tuple[str, ...]) -> str:
    found = iter(values)
    return re.sub(r"\{\w+\}", lambda _: next(found), template)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One kind of tensor.

    Attributes:
        take: Template of the lineage's name.
        give: Template of timm's name, with the same placeholders in the same order; None drops the tensor.
        why: Reason of a drop.
        reshape: How the shapes differ.
        part: (k, n): the tensor is the k-th of n that timm holds concatenated along the first dimension.
        swiglu: Whether only networks with a SwiGLU MLP have this name; others then have another rule for it.
    """

    take: str
    give: str | None
    why: str = ""
    reshape: Reshape = Reshape.SAME
    part: tuple[int, int] = WHOLE
    swiglu: bool = False

    def timm_name(self, name: str) -> str | None:
        """timm's name of a tensor that `matches`."""
        found = _pattern(self.take).fullmatch(name)
        return _fill(self.give, found.groups()) if found and self.give else None

    def matches(self, name: str) -> bool:
        """Whether the rule is about a tensor of the lineage."""
        return _pattern(self.take).fullmatch(name) is not None

    def source_name(self, timm_name: str) -> str | None:
        """The lineage's name of a tensor of timm's, None where the rule is about another."""
        found = _pattern(self.give).fullmatch(timm_name) if self.give else None
        return _fill(self.take, found.groups()) if found else None


def keep(
    take: str,
    give: str | None = None,
    *,
    reshape: Reshape = Reshape.SAME,
    part: tuple[int, int] = WHOLE,
    swiglu: bool = False,
) -> Rule:
    """A tensor that timm has, by default under the same name."""
    return Rule(take=take, give=give or take, reshape=reshape, part=part, swiglu=swiglu)


def drop(take: str, why: str) -> Rule:
    """A tensor that timm has no place for."""
    return Rule(take=take, give=None, why=why)


def qkv(query: str, key: str, value: str) -> tuple[Rule, ...]:
    """Three projections that timm holds as one."""
    give = "blocks.{i}.attn.qkv.{x}"
    return tuple(keep(take, give, part=(k, 3)) for k, take in enumerate((query, key, value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFormat:
    """How one lineage stores a ViT, and what of it no tensor tells.

    Attributes:
        name: What `--format` takes.
        title: Whose checkpoints these are.
        library: timm, transformers or open_clip, where one of them writes these files with a config beside; else "".
        rules: Tensors of the vision tower, without prefix.
        outside: Tensors that may stand beside the tower, with all of their name.
        prefixes: Prefixes that the tower's names may have; the first that occurs counts, all others are outside.
        respell: (pattern, replacement) for spellings of the same name.
        marks: Patterns of names without prefix; a checkpoint in which each occurs has this format.
        family: Key of `vitreg_hub.arch.FAMILIES`, where the format decides it.
        norm_eps: LayerNorm epsilon, None where only a config tells.
        act: timm's name of the activation, None where only a config or the user tells.
        heads: Attention heads by width.
        other_rows: Rows of the position table before those of the patches, None where the table's length tells.
        positions: How the lineage resamples positions.
        registers_positions: The same for checkpoints with registers, where it differs.
        mean: Channel means of the normalisation.
        std: Channel standard deviations of the normalisation.
        crop_pct: Share of the resized image that the evaluation's centre crop keeps.
        head_bias: Whether the head always has a bias, as timm's has.
        needs_config: Whether facts can only come from the config.json beside the weights.
        needs_prefix: Whether the tower's names always have one of the prefixes.
        alone_when_bare: Whether nothing may stand beside a tower whose names have no prefix.
    """

    name: str
    title: str
    library: str = ""
    rules: tuple[Rule, ...]
    outside: tuple[Rule, ...] = ()
    prefixes: tuple[str, ...] = ()
    respell: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()
    family: str | None = None
    norm_eps: float | None = 1e-6
    act: str | None = "gelu"
    heads: Mapping[int, int] = field(default_factory=dict)
    other_rows: int | None = 1
    positions: PositionRule = TIMM_RULE
    registers_positions: PositionRule | None = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    head_bias: bool = True
    needs_config: bool = False
    needs_prefix: bool = False
    alone_when_bare: bool = False

    def prefix_in(self, names: Mapping[str, object]) -> str:
        """The prefix that the tower's names have in a checkpoint."""
        return next((p for p in self.prefixes if any(name.startswith(p) for name in names)), "")

    def spelled(self, name: str, prefix: str) -> str:
        """A name of the tower without its prefix, in the spelling of the rules."""
        name = name.removeprefix(prefix)
        for pattern, replacement in self.respell:
            name = re.sub(pattern, replacement, name)
        return name

    def rules_for(self, name: str, prefix: str) -> list[Rule]:
        """All rules that match a name: exactly one for a checkpoint of this format."""
        found = []
        if name.startswith(prefix):
            spelled = self.spelled(name, prefix)
            found = [rule for rule in self.rules if rule.matches(spelled)]
            if found or prefix or self.alone_when_bare:
                return found
        return [rule for rule in self.outside if rule.matches(name)]

    def is_marked(self, names: Mapping[str, object]) -> bool:
        """Whether the names bear all marks of the format."""
        prefix = self.prefix_in(names)
        if self.needs_prefix and not prefix:
            return False
        inside = [self.spelled(name, prefix) for name in names if name.startswith(prefix)]
        return bool(self.marks) and all(any(re.fullmatch(mark, name) for name in inside) for mark in self.marks)
