"""DINOv2: a student learns from its moving average what crops have in common and what masked patches contain."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub import typed
from vitreg_hub.errors import RecipeError, VitregError
from vitreg_hub.training.distributed.parallel import average_into
from vitreg_hub.training.run.folders import state_file
from vitreg_hub.training.run.state import FILES, read_state, read_tensors
from vitreg_hub.training.schedules import CosineSchedule, linear_then_constant
from vitreg_hub.training.tasks.base import Batch, RunFacts, StepOutput, Task
from vitreg_hub.training.tasks.dinov2.head import DinoHead
from vitreg_hub.training.tasks.dinov2.losses import (
    RunningCentre,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)
from vitreg_hub.training.tasks.dinov2.masks import BlockMasks, masked_indices_and_weights
from vitreg_hub.training.tasks.dinov2.settings import DinoV2, Head

GLOBAL_CROPS = 2


class DinoNetwork(nn.Module):
    """Backbone and heads, of the student or of the teacher."""

    def __init__(self, backbone: VisionTransformer, *, dino_head: Head, ibot_head: Head | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = DinoHead(backbone.embed_dim, dino_head)
        self.ibot_head = None if ibot_head is None else DinoHead(backbone.embed_dim, ibot_head)

    def forward(
        self,
        global_crops: Tensor,
        masked: Tensor,
        *,
        masks: Tensor | None = None,
        local_crops: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute what the losses need.

        Args:
            global_crops: [2B, 3, H, W], all first crops before all second ones.
            masked: Indices of the masked patches among all patches of the global crops [M].
            masks: Patches hidden from the backbone [2B, N]; None: it sees all.
            local_crops: [L * B, 3, h, w], crop by crop.

        Returns:
            `class_tokens` of the global crops, normed [2B, D]; logits `global_logits` [2B, K], `local_logits`
            [L * B, K] and `patch_logits` [M, K'].
        """
        with hidden_patches(self.backbone, masks):
            tokens = self.backbone.forward_features(global_crops)
        patches = tokens[:, self.backbone.num_prefix_tokens :].flatten(0, 1)
        outputs = {
            "class_tokens": tokens[:, 0],
            "global_logits": self.dino_head(tokens[:, 0]),
            "patch_logits": (self.ibot_head or self.dino_head)(patches[masked]),
        }
        if local_crops is not None:
            outputs["local_logits"] = self.dino_head(self.backbone.forward_features(local_crops)[:, 0])
        return outputs


@contextmanager
def hidden_patches(backbone: VisionTransformer, masks: Tensor | None) -> Iterator[None]:
    """Replace patches [B, N] with the ViT's parameter `mask_token` [1, D], before positions are added."""
    if masks is None:
        yield
        return

    def hide(module: nn.Module, args: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        hidden = masks.view(*patches.shape[:-1], 1)  # with dynamic image sizes, patches come as a grid
        return torch.where(hidden, backbone.get_parameter("mask_token").to(patches.dtype), patches)

    handle = backbone.patch_embed.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def load_heads(network: DinoNetwork, checkpoint: Path) -> None:
    """Load the heads of another run.

    Raises:
        RecipeError: They are missing or do not fit.
    """
    try:
        state = read_state(checkpoint)
        told = state.get(FILES) if isinstance(state, dict) else None
        sums = None if told is None else typed.read(dict[str, str], told, called=FILES)
        file = state_file(checkpoint, "heads")
        left = network.load_state_dict(read_tensors([file], sums)[file.stem], strict=False)
        missing = [name for name in left.missing_keys if not name.startswith("backbone.")]
        wrong = [*missing, *left.unexpected_keys]
        problem = f"{len(wrong)} tensors differ, first {wrong[0]}" if wrong else None
    except (OSError, SafetensorError, RuntimeError, ValueError, VitregError) as error:
        problem = str(error).strip().rpartition("\n")[2].strip()
    if problem:
        raise RecipeError(
            f"task.heads {checkpoint} gives no heads that fit ({problem}): name a folder run/checkpoints/step_... of a "
            "DINOv2 run with the same heads."
        )


class DinoV2Task(Task[DinoNetwork]):
    """Student, teacher and their losses.

    Source: dinov2/train/ssl_meta_arch.py (Apache-2.0).
    """

    def __init__(self, settings: DinoV2, backbone: VisionTransformer, run: RunFacts) -> None:
        """Give the student heads, new ones or another run's, and a mask token, and the teacher the same weights.

        Raises:
            RecipeError: The heads of another run do not fit.
        """
        self.settings, self.batch_size, self.seed, span = settings, run.batch_size, run.seed, run.span
        self.network = DinoNetwork(backbone, dino_head=settings.dino_head, ibot_head=settings.ibot_head)
        if settings.heads is not None:
            load_heads(self.network, Path(settings.heads))
        self.teacher = deepcopy(self.network).eval().requires_grad_(False)
        # only the student sees hidden patches; upstream starts the token at zero too (vision_transformer.py)
        backbone.mask_token = nn.Parameter(torch.zeros(1, backbone.embed_dim))
        self.frozen = {"teacher": self.teacher}
        self.centers: dict[str, RunningCentre] = {}
        if settings.centering == "running_mean":
            heads = {"dino": settings.dino_head, "ibot": settings.ibot_head or settings.dino_head}
            for name, head in heads.items():
                self.centers[name] = RunningCentre(head.prototypes, momentum=settings.center_momentum)
            self.frozen["centers"] = nn.ModuleDict(self.centers)
        self.masks = BlockMasks(
            grid=backbone.patch_embed.grid_size, probability=settings.mask_probability, ratio=settings.mask_ratio
        )
        self.hold = {
            "last_layer": span.steps(settings.freeze_last_layer_epochs),
            "backbone": span.steps(settings.heads_first_epochs),
        }
        start, end = settings.teacher_temperature
        warmup = min(span.steps(settings.teacher_temperature_epochs), span.total_steps)
        self.temperature = linear_then_constant(end, warmup=warmup, start=start)
        self.momentum = CosineSchedule(base=settings.momentum[0], final=settings.momentum[1], total=span.total_steps)

    def training_step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """DINO, iBOT and KoLeo losses of one batch of crops."""
        return self.losses(network, batch.crops, self._masks(batch), temperature=self.temperature(batch.step))

    def losses(self, network: nn.Module, crops: tuple[Tensor, ...], masks: Tensor, *, temperature: float) -> StepOutput:
        """The losses of given crops and masks, by the teacher's temperature.

        Args:
            crops: Two global and L local ones, each [B, 3, H, W].
            masks: Hidden patches of the global crops, all first ones before all second ones [2B, N], on the CPU.
        """
        settings = self.settings
        global_crops, num_local = torch.cat(crops[:GLOBAL_CROPS]), len(crops) - GLOBAL_CROPS
        masked, weights, masks = (
            tensor.to(global_crops.device, non_blocking=True) for tensor in (*masked_indices_and_weights(masks), masks)
        )
        targets, patch_targets = self._targets(global_crops, masked, temperature)
        local_crops = torch.cat(crops[GLOBAL_CROPS:]) if num_local else None
        student = network(global_crops, masked, masks=masks, local_crops=local_crops)

        sharp = {"temperature": settings.student_temperature}
        by_crop = student["global_logits"].unflatten(0, (GLOBAL_CROPS, -1))
        terms = {
            "dino_global": dino_global_loss(by_crop, targets, num_local=num_local, **sharp) * settings.dino_weight,
            "ibot": ibot_loss(student["patch_logits"], patch_targets, weights, num_crops=len(global_crops), **sharp)
            * settings.ibot_weight,
        }
        if num_local:
            by_crop = student["local_logits"].unflatten(0, (num_local, -1))
            terms["dino_local"] = dino_local_loss(by_crop, targets, **sharp) * settings.dino_weight
        if settings.koleo_weight:
            halves = student["class_tokens"].chunk(GLOBAL_CROPS)
            koleo = sum(
                (koleo_loss(half, global_batch=settings.koleo_global) for half in halves), start=torch.zeros(())
            )
            terms["koleo"] = koleo * settings.koleo_weight
        return StepOutput(
            loss=sum(terms.values(), start=torch.zeros(())),
            metrics={f"loss_{name}": term.detach() for name, term in terms.items()},
        )

    @torch.no_grad()
    def _targets(self, global_crops: Tensor, masked: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for class tokens [2, B, K] and for the patches hidden from the student."""
        seen = self.teacher(global_crops, masked)
        logits = {"dino": seen["global_logits"], "ibot": seen["patch_logits"]}
        if self.centers:
            targets = {name: self.centers[name](values, temperature) for name, values in logits.items()}
            for name, values in logits.items():
                self.centers[name].update(values)
        else:
            passes = self.settings.sinkhorn_iterations
            targets = {name: sinkhorn_knopp(x, temperature, iterations=passes) for name, x in logits.items()}
        return targets["dino"].unflatten(0, (GLOBAL_CROPS, -1)), targets["ibot"]

    def _masks(self, batch: Batch) -> Tensor:
        """Hidden patches of this process's global crops [2b, N], planned for the whole global batch."""
        size, random = self.batch_size, {"seed": self.seed, "step": batch.step}
        plan = self.masks.plan(GLOBAL_CROPS * size, **random)
        drawn = [
            self.masks.mask(int(plan[crop * size + position]), position=position, crop=crop, **random)
            for crop in range(GLOBAL_CROPS)
            for position in batch.positions.tolist()
        ]
        return torch.stack(drawn)

    def after_step(self, step: int) -> None:
        """Move the teacher towards the student."""
        average_into(self.teacher, self.network, self.momentum(step))

    @property
    def published(self) -> nn.Module:
        """The teacher's ViT."""
        return self.teacher.backbone
