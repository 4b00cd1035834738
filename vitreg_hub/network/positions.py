"""Makes a timm ViT resample its position embeddings by the rule of another lineage."""

from typing import Any

import torch
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitreg_hub.errors import BundleError
from vitreg_hub.network.position_rule import TIMM_RULE, PositionRule


class _FollowsRule(VisionTransformer):
    """A timm ViT that resamples its positions by its own rule wherever timm does."""

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
        table = self.position_rule.resample(
            self.pos_embed, old=self.patch_embed.grid_size, new=(x.shape[1], x.shape[2])
        )
        x = x.flatten(1, 2)
        tokens = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
        others = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*others, x + table], dim=1))
        return self.pos_drop(torch.cat([*others, x], dim=1) + table)


class RuledVisionTransformer(_FollowsRule):
    """`VisionTransformer` with a position rule."""


class RuledVisionTransformerDistilled(_FollowsRule, VisionTransformerDistilled):
    """`VisionTransformerDistilled` with a position rule."""


RULED = {VisionTransformer: RuledVisionTransformer, VisionTransformerDistilled: RuledVisionTransformerDistilled}


def follow(model: VisionTransformer, rule: PositionRule) -> None:
    """Make a model resample its positions by a rule. This changes its class, which timm's entrypoints fix.

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
