"""The interface of objectives to the training loop: a task turns batches into losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.training.schedules import Span

Network = TypeVar("Network", bound=nn.Module)

Scorer = Callable[[Tensor, Tensor], Mapping[str, Tensor]]
"""Takes images [B, 3, H, W] and labels [B] (-1: unknown); gives scores [B] by name, NaN where an image has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One process's part of a step's images, b of B.

    Attributes:
        step: Number of the step, from 0.
        positions: Places of the images in the global batch [b].
        crops: Views of the images, each [b, 3, H, W]: one, or with multi-crop two global ones and the local ones.
        labels: Classes [b], if there are any.
        corrupt: Names of the images that could not be read and were replaced.
    """

    step: int
    positions: Tensor
    names: tuple[str, ...]
    crops: tuple[Tensor, ...]
    labels: Tensor | None = None
    texts: tuple[str, ...] | None = None
    corrupt: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """The loss of one part of a step, whose mean over processes is the global batch's, and further numbers by name."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a task may know about its run; `batch_size` counts the images of a step in all processes."""

    span: Span
    batch_size: int
    seed: int
    label_names: Sequence[str] | None = None


class Task(ABC, Generic[Network]):
    """An objective with its modules.

    Attributes:
        network: What is trained. `training_step` calls its `forward`, which computes everything that gradients flow
            through. The child called `backbone` is the ViT, all others count as heads.
        frozen: Modules that are not trained by gradients but belong to the state (teacher, averaged weights), by name.
            If one has children, they are those of `network`.
        hold: Steps at the start in which parameters keep their values, by kind: "backbone", or "last_layer" of heads.
    """

    network: Network
    frozen: dict[str, nn.Module]
    hold: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def __init__(self, settings: Any, backbone: VisionTransformer, run: RunFacts) -> None:
        """Make the objective for a ViT, which has a head if the objective classifies.

        New weights are drawn from torch's default generator.

        Raises:
            VitregError: The settings do not fit the ViT, or something that they name is missing.
        """

    @abstractmethod
    def training_step(self, network: nn.Module, batch: Batch) -> StepOutput:
        """Losses of one batch. `network` is `self.network`, wrapped for several processes."""

    def after_step(self, step: int) -> None:
        """Called after step `step` (from 0) of the optimiser, to average or clamp weights; does nothing by default."""

    @property
    @abstractmethod
    def published(self) -> nn.Module:
        """What is evaluated and exported of `network` or `frozen`: a ViT, or a module with one as `backbone`."""

    @property
    def compared(self) -> Mapping[str, nn.Module]:
        """What is scored besides, by name: networks with the names of `published`'s weights; none by default."""
        return {}

    def write_beside(self, model: Any, bundle: ModelBundle, folder: Path) -> None:
        """Write beside a bundle's future folder what belongs to the model but has no place in it; nothing by default.

        `model` is an unsharded copy of `published`.
        """

    def scorer(self, model: Any) -> Scorer:
        """Make the scorer of held-out images for a copy of `published`, on one device and in evaluation mode.

        By default there are no scores but k-NN accuracy, which every model gets.
        """
        return lambda images, labels: {}


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest of the logits [B, classes] is the label's: 1 or 0 [B], or NaN without a label."""
    return (logits.argmax(1) == labels).float().masked_fill(labels < 0, torch.nan)
