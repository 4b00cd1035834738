"""timm's optimisers with the parameter groups of a recipe, and the rates of every group at each step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.distributed.parallel import full
from vitreg_hub.training.optim.param_groups import param_groups
from vitreg_hub.training.recipes.settings import OptimSettings
from vitreg_hub.training.schedules import CosineSchedule, Span


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Learning rate and weight decay of a run, before the factors of the groups; `hold` is the task's."""

    lr: CosineSchedule
    weight_decay: CosineSchedule
    hold: Mapping[str, int]

    @classmethod
    def of(cls, settings: OptimSettings, span: Span, *, batch_size: int, hold: Mapping[str, int]) -> "Rates":
        """Schedules over a run."""
        end = settings.weight_decay if settings.weight_decay_end is None else settings.weight_decay_end
        return cls(
            lr=CosineSchedule(
                base=peak_lr(settings, batch_size),
                final=settings.min_lr,
                total=span.total_steps,
                warmup=span.steps(settings.warmup_epochs),
                warmup_start=settings.warmup_lr,
            ),
            weight_decay=CosineSchedule(base=settings.weight_decay, final=end, total=span.total_steps),
            hold=hold,
        )

    def apply(self, optimizer: Optimizer, step: int) -> None:
        """Set the rates of every group for a step."""
        lr, weight_decay = self.lr(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            held = step < self.hold.get(group["role"], 0)
            if group["last_layer"]:
                held = held or step < self.hold.get("last_layer", 0)
            group["lr"] = 0.0 if held else lr * group["lr_scale"]
            group["weight_decay"] = weight_decay * group["wd_scale"]


def peak_lr(settings: OptimSettings, batch_size: int) -> float:
    """Peak rate for a global batch. Source of the rule: dinov2/utils/config.py, `apply_scaling_rules_to_cfg`."""
    return settings.lr if settings.lr_batch is None else settings.lr * (batch_size / settings.lr_batch) ** 0.5


def build_optimizer(network: nn.Module, settings: OptimSettings, *, depth: int) -> Optimizer:
    """Build the optimiser over all parameters with gradients; their rates are set by `Rates.apply`.

    Raises:
        RecipeError: timm has no such optimiser, or the optimiser does not accept such settings.
    """
    groups = param_groups(
        network.named_parameters(),
        depth=depth,
        rule=settings.decay_rule,
        layer_decay=settings.layer_decay,
        patch_embed_lr=settings.patch_embed_lr,
    )
    if not groups:
        raise RecipeError("nothing is trained: no parameter of the network takes gradients.")
    given: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps}
    extra = {name: value for name, value in given.items() if value is not None}
    try:
        return create_optimizer_v2(groups, opt=settings.opt, lr=settings.lr, weight_decay=0.0, **extra)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"optim.opt {settings.opt!r} cannot be made ({reason}): see timm.optim.list_optimizers()."
        ) from error


def clip_gradients(network: nn.Module, settings: OptimSettings) -> Tensor | None:
    """Clip the gradients' norm, of all or of each child of the network separately. Returns the largest norm before.

    Source of the latter: dinov2/train/train.py (`for v in model.student.values(): v.clip_grad_norm_`).
    """
    if settings.clip is None:
        return None
    parts = [list(network.parameters())]
    if settings.clip_per_module:
        parts = [list(child.parameters()) for child in network.children()]
        parts.append(list(network.parameters(recurse=False)))
    norms = [torch.nn.utils.clip_grad_norm_(part, settings.clip) for part in parts if part]
    return torch.stack([full(norm) for norm in norms]).max()
