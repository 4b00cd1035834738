"""Which tensor of a checkpoint becomes which of timm's, what does not fit, and what the shapes tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.detect import nearest, prefix_hint
from vitreg_hub.conversion.formats.rules import Rule
from vitreg_hub.errors import ConversionError

FLOATS = ("F32", "F16", "BF16", "F64")
SHOWN = 8
"""How many problems a message names; the others are counted."""

MAX_BLOCKS = 300
"""The deepest published ViTs have 64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A checkpoint in timm's names.

    Attributes:
        parts: For every name in timm, the checkpoint's tensors that are concatenated to it, with their rules.
    """

    checkpoint: Checkpoint = field(repr=False)
    fmt: CheckpointFormat
    parts: Mapping[str, tuple[tuple[str, Rule], ...]]
    dropped: Mapping[str, tuple[str, ...]]
    problems: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of timm's tensors; empty where the checkpoint does not have it."""
        infos = self.checkpoint.infos
        shapes = [rule.reshape.timm_shape(infos[part].shape) for part, rule in self.parts.get(name, ())]
        if not shapes:
            return ()
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str) -> Tensor:
        """Read one of timm's tensors, in float32."""
        parts = [rule.reshape.to_timm(self.checkpoint.read(part)) for part, rule in self.parts[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def lineage_name(self, name: str) -> str:
        """How the checkpoint's format calls one of timm's tensors."""
        found = (rule.lineage_name(name) for rule in (*self.fmt.rules, *self.fmt.outside))
        return next((own for own in found if own), name)

    def require_fit(self, wanted: Mapping[str, tuple[int, ...]], *, made: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint that, with the tensors that the conversion makes itself, has not those of a network."""
        problems = []
        for name in sorted(wanted.keys() - made.keys() - self.parts.keys()):
            problems.append(f"{self.lineage_name(name)} is missing")
        for name, shape in wanted.items():
            found = made.get(name) or self.shape(name)
            if found not in ((), shape):
                problems.append(f"{self.lineage_name(name)} has shape {list(found)}, wanted {list(shape)}")
        for name in sorted(self.parts.keys() - wanted.keys() - made.keys()):
            problems.append(f"{self.parts[name][0][0]} has no place in the network")
        self.refuse(*problems)

    def refuse(self, *more: str) -> None:
        """Raise a ConversionError that tells all problems and those given, if there are any."""
        problems = [*self.problems, *more]
        if not problems:
            return
        message = f"{self.checkpoint.called} does not fit the format {self.fmt.name} ({self.fmt.title}): "
        problems.sort(key=lambda problem: problem.endswith(" is unknown"))  # what is lacking tells more
        message += "; ".join(problems[:SHOWN])
        message += f"; and {len(problems) - SHOWN} more." if len(problems) > SHOWN else "."
        near = nearest(self.checkpoint.infos)
        if hint := prefix_hint(self.checkpoint.infos):
            message += f" But {hint}."
        elif near and near != self.fmt:
            message += f" The names are nearest to {near.name}'s."
        if "rank_" in self.checkpoint.files[0].name:
            message += " It looks like one rank's part of a run: merge the ranks first."
        raise ConversionError(message)


def assign(checkpoint: Checkpoint, fmt: CheckpointFormat) -> Assignment:
    """Find the rule of every tensor. Nothing is read; problems are collected, not raised."""
    parts: dict[str, dict[int, tuple[str, Rule]]] = {}
    dropped: dict[str, list[str]] = {}
    problems: list[str] = []
    for name, matching in fmt.rules_of(checkpoint.infos):
        info = checkpoint.infos[name]
        if len(matching) != 1:
            problems.append(f"{name} {list(info.shape)} {'fits several rules' if matching else 'is unknown'}")
            continue
        rule, target = matching[0]
        if not target:
            dropped.setdefault(rule.why, []).append(name)
            continue
        if info.dtype not in FLOATS:
            problems.append(f"{name} holds {info.dtype}, no floating-point numbers")
        if rule.reshape.dims not in (None, len(info.shape)) or not info.shape:
            problems.append(
                f"{name} has shape {list(info.shape)}, wanted {rule.reshape.dims or 'at least 1'} dimensions"
            )
            continue
        if 0 in info.shape:
            problems.append(f"{name} has shape {list(info.shape)}, which is empty")
            continue
        if (twin := parts.setdefault(target, {}).get(rule.part[0])) is not None:
            problems.append(f"{name} and {twin[0]} are the same tensor")
        parts[target][rule.part[0]] = (name, rule)
    complete = {}
    for target, found in parts.items():
        ordered = tuple(found[k] for k in sorted(found))
        names = ", ".join(name for name, _ in ordered)
        shapes = [checkpoint.infos[name].shape for name, _ in ordered]
        if {rule.part[1] for _, rule in ordered} != {len(ordered)}:
            problems.append(f"{names}: {len(ordered)} of {ordered[0][1].part[1]} parts of one matrix")
        elif len(set(shapes)) > 1:
            problems.append(f"{names} differ in shape: {', '.join(map(str, shapes))}")
        else:
            complete[target] = ordered
    return Assignment(
        checkpoint=checkpoint,
        fmt=fmt,
        parts=complete,
        dropped={why: tuple(names) for why, names in dropped.items()},
        problems=tuple(problems),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What tensors tell: sizes, and which parts there are.

    Attributes:
        hidden: Outputs of the MLP's first layer.
        swiglu: Whether these outputs are gate and value.
        proj_bias: Whether layers other than queries, keys and values have a bias.
        average: Whether the norm follows the pooling, as in models that average patches.
    """

    embed_dim: int
    depth: int
    patch_size: tuple[int, int]
    in_chans: int
    hidden: int
    swiglu: bool
    layer_scale: bool
    pre_norm: bool
    qkv_bias: bool
    proj_bias: bool
    num_registers: int
    distilled: bool
    position_rows: int
    num_classes: int
    average: bool

    @classmethod
    def of(cls, tensors: Assignment) -> Self:
        """Read the structure from shapes.

        Raises:
            ConversionError: A tensor that decides it is missing or has the wrong shape; tells all other problems too.
        """
        dims = {
            "patch_embed.proj.weight": 4,
            "pos_embed": 3,
            "cls_token": 3,
            "blocks.0.attn.qkv.weight": 2,
            "blocks.0.mlp.fc1.weight": 2,
            "blocks.0.mlp.fc2.weight": 2,
        }
        optional = {"reg_token": 3, "dist_token": 3, "head.weight": 2}
        problems = []
        for name, number in (dims | optional).items():
            own, shape = tensors.lineage_name(name), tensors.shape(name)
            if name not in tensors and name in dims:
                problems.append(f"{own} is missing")
            elif name in tensors and len(shape) != number:
                problems.append(f"{own} has shape {list(shape)}, wanted {number} dimensions")
        blocks = {int(name.split(".")[1]) for name in tensors.parts if name.startswith("blocks.")}
        if len(blocks) > MAX_BLOCKS:
            raise ConversionError(f"{tensors.checkpoint.called} has {len(blocks)} blocks, more than any ViT.")
        gaps = sorted(set(range(1, len(blocks))) - blocks)
        if gaps:
            problems.append(f"block {gaps[0]} is missing")
        if problems:
            tensors.refuse(*problems)
        hidden, inner = tensors.shape("blocks.0.mlp.fc1.weight")[0], tensors.shape("blocks.0.mlp.fc2.weight")[1]
        first_layers = [parts[0] for name, parts in tensors.parts.items() if name.endswith(".mlp.fc1.weight")]
        gated = [name for name, rule in first_layers if rule.swiglu]
        if gated and hidden != 2 * inner:
            tensors.refuse(f"{gated[0]} must have gate and value for {inner} channels")
        embed_dim, in_chans, patch_height, patch_width = tensors.shape("patch_embed.proj.weight")
        return cls(
            embed_dim=embed_dim,
            depth=len(blocks),
            patch_size=(patch_height, patch_width),
            in_chans=in_chans,
            hidden=hidden,
            swiglu=hidden == 2 * inner,
            layer_scale=any(name.endswith(".ls1.gamma") for name in tensors.parts),
            pre_norm="norm_pre.weight" in tensors,
            qkv_bias="blocks.0.attn.qkv.bias" in tensors,
            proj_bias="blocks.0.attn.proj.bias" in tensors,
            num_registers=tensors.shape("reg_token")[1] if "reg_token" in tensors else 0,
            distilled="dist_token" in tensors,
            position_rows=tensors.shape("pos_embed")[1],
            num_classes=tensors.shape("head.weight")[0] if "head.weight" in tensors else 0,
            average="fc_norm.weight" in tensors,
        )
