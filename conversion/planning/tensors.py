"""Making the tensors of a bundle, one at a time: copies, class tokens with their positions, tables, new registers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitreg_hub.arch import REGISTER_INIT_STD
from vitreg_hub.conversion.planning.assignment import Assignment
from vitreg_hub.network.position_rule import Grid, PositionRule
from vitreg_hub.network.residual_scale import WRITES_TO_STREAM


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembly:
    """The tensors of one bundle.

    Attributes:
        tensors: The checkpoint in timm's names.
        wanted: Shape of every tensor of the bundle.
        native: Height and width in patches of the checkpoint's position table.
        grid: The same for the bundle.
        other_rows: Rows of the checkpoint's table before those of the patches.
        rule: How positions are resampled.
        scale: How many times larger the bundle's residual stream is.
        is_scaled: Whether the checkpoint's residual stream has this scale already.
        num_new_registers: Registers that the bundle has and the checkpoint does not.
    """

    tensors: Assignment = field(repr=False)
    wanted: Mapping[str, tuple[int, ...]] = field(repr=False)
    native: Grid
    grid: Grid
    other_rows: int
    rule: PositionRule
    scale: float
    is_scaled: bool
    num_new_registers: int

    @property
    def distillation_is_register(self) -> bool:
        """Whether the checkpoint's distillation token becomes a register, as the network has no other place for it."""
        return "dist_token" in self.tensors and "dist_token" not in self.wanted

    @property
    def num_untrained_registers(self) -> int:
        """Registers that are drawn at random."""
        return self.num_new_registers - (1 if self.distillation_is_register else 0)

    def lost(self) -> dict[str, tuple[str, ...]]:
        """Names in the checkpoint that the format knows but the network has no place for, by reason."""
        names = tuple(parts[0][0] for name, parts in self.tensors.parts.items() if name.startswith("head_dist."))
        if not names or not self.distillation_is_register:
            return {}
        return {"a network with registers has one head, on the class token": names}

    def made(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are not copies, as they come out for this checkpoint."""
        batch, _, width = self.tensors.shape("pos_embed")
        made = {"cls_token": self.tensors.shape("cls_token"), "pos_embed": (batch, self.wanted["pos_embed"][1], width)}
        if self.num_new_registers:
            made["reg_token"] = (1, self.num_new_registers, width)
        has_projection = "head.weight" in self.tensors and self.tensors.fmt.head_is_projection
        if has_projection and "head.bias" not in self.tensors:
            made["head.bias"] = self.wanted["head.bias"]
        for name in self.tensors.parts:
            if self.distillation_is_register and name.startswith(("dist_token", "head_dist.")):
                made[name] = self.tensors.shape(name)
        return made

    def make(self, name: str) -> Tensor:
        """Read or make a tensor, float32 and contiguous."""
        tensor = self._make(name)
        if self.scale != 1 and not self.is_scaled and WRITES_TO_STREAM.fullmatch(name):
            tensor = tensor * self.scale
        return tensor.contiguous()

    def _make(self, name: str) -> Tensor:
        if name == "pos_embed":
            table = self.tensors.read("pos_embed")
            if "dist_token" not in self.wanted:
                table = table[:, self.other_rows :]
            return self.rule.resample(table, old=self.native, new=self.grid)
        if name == "reg_token" and self.num_new_registers:
            return self._new_registers()
        if name == "head.bias" and name not in self.tensors:
            return torch.zeros(self.wanted[name])
        tensor = self.tensors.read(name)
        if "dist_token" in self.wanted:
            return tensor
        if name == "cls_token" and self.other_rows:
            return tensor + self.tensors.read("pos_embed")[:, :1]
        if name == "reg_token" and self.other_rows > 1:
            return tensor + self.tensors.read("pos_embed")[:, 1 : self.other_rows]
        return tensor

    def _new_registers(self) -> Tensor:
        _, number, width = self.wanted["reg_token"]
        generator = torch.Generator().manual_seed(0)
        std = REGISTER_INIT_STD * (self.scale if self.is_scaled else 1)
        registers = torch.randn(1, number, width, generator=generator) * std
        if self.distillation_is_register:
            registers[:, :1] = self.tensors.read("dist_token") + self.tensors.read("pos_embed")[:, 1:2]
        return registers
