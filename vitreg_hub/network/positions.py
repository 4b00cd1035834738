"""How position embeddings are resampled for another grid: lineages differ, and only their own way is exact."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitreg_hub.errors import BundleError

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionRule:
    """Bicubic interpolation of a position table, as one lineage does it. The defaults are timm's.

    Attributes:
        antialias: Whether the filter is widened when the grid shrinks; it also has another cubic coefficient.
        offset: Added to the new height and width before the scale is computed, and the table is then sampled at that
            scale (dinov2/models/vision_transformer.py, `interpolate_pos_encoding`); 0 samples by size.
        keep_equal_count: Whether a table with as many rows as the new grid is used as it is, whatever its shape
            (open_clip/model.py, `resize_pos_embed`).
    """

    antialias: bool = True
    offset: float = 0.0
    keep_equal_count: bool = False

    def __post_init__(self) -> None:
        for name in ("antialias", "keep_equal_count"):
            if not isinstance(getattr(self, name), bool):
                raise BundleError(f"positions.{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.offset) not in (int, float) or not 0 <= self.offset < 1:  # also refuses what is no number
            raise BundleError(f"positions.offset must be a number from 0 to 1, 1 excluded, not {self.offset!r}")

    def resample(self, table: Tensor, *, old: Grid, new: Grid) -> Tensor:
        """Resample the rows of the patches; rows of other tokens, which come first, are kept.

        Args:
            table: [1, P + h * w, D] for P other tokens and `old` = (h, w).
            old: Height and width of the table's grid in patches.
            new: Height and width of the wanted grid in patches.

        Returns:
            [1, P + H * W, D] for `new` = (H, W), in the table's dtype; the table itself where nothing changes.
        """
        (old_height, old_width), (height, width) = old, new
        # without an offset the same grid gives the same table, so an exported program need not be bound to one side
        # of this question
        if (self.offset or not torch.compiler.is_exporting()) and (old_height, old_width) == (height, width):
            return table
        if self.keep_equal_count and old_height * old_width == height * width:
            return table
        others, patches = table.tensor_split([table.shape[1] - old_height * old_width], dim=1)
        image = patches.float().unflatten(1, (old_height, old_width)).permute(0, 3, 1, 2)
        if self.offset:
            scale = ((height + self.offset) / old_height, (width + self.offset) / old_width)
            image = nn.functional.interpolate(image, scale_factor=scale, mode="bicubic", antialias=self.antialias)
        else:
            image = nn.functional.interpolate(image, size=(height, width), mode="bicubic", antialias=self.antialias)
        patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
        return torch.cat([others, patches], dim=1)


TIMM_RULE = PositionRule()


class _FollowsRule:
    """A timm ViT that resamples its positions by a rule of its own wherever timm does."""

    position_rule: PositionRule

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Change the native size, as timm does."""
        table, old = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(*args, **kwargs)
        if table is not None:
            resampled = self.position_rule.resample(table.detach(), old=old, new=self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resampled, requires_grad=table.requires_grad)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.pos_embed is None or not self.dynamic_img_size:
            return super()._pos_embed(x)
        table = self.position_rule.resample(self.pos_embed, old=self.patch_embed.grid_size, new=tuple(x.shape[1:3]))
        x = x.flatten(1, 2)
        tokens = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
        others = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*others, x + table], dim=1))
        return self.pos_drop(torch.cat([*others, x], dim=1) + table)


class RuledVisionTransformer(_FollowsRule, VisionTransformer):
    """`VisionTransformer` with a position rule."""


class RuledVisionTransformerDistilled(_FollowsRule, VisionTransformerDistilled):
    """`VisionTransformerDistilled` with a position rule."""


RULED = {VisionTransformer: RuledVisionTransformer, VisionTransformerDistilled: RuledVisionTransformerDistilled}


def follow(model: VisionTransformer, rule: PositionRule) -> None:
    """Let a model resample its positions by a rule. Its class changes, for timm's entrypoints fix it; nothing else.

    Raises:
        BundleError: The model is of another class than timm's `VisionTransformer` and `VisionTransformerDistilled`.
    """
    if rule == rule_of(model):
        return
    if type(model) in RULED:
        model.__class__ = RULED[type(model)]
    if not isinstance(model, _FollowsRule):
        raise BundleError(f"a {type(model).__name__} cannot follow a position rule; a timm VisionTransformer can.")
    model.position_rule = rule


def rule_of(model: nn.Module) -> PositionRule:
    """The rule that a model follows."""
    return getattr(model, "position_rule", TIMM_RULE)
