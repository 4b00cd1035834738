"""How a head is trained, whatever it tells: the steps, the order of the images, and who computes what."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.heads import DenseHead
from vitreg_hub.evaluation.dense.loading import Workers, made
from vitreg_hub.evaluation.dense.maps import resized
from vitreg_hub.passes import failing_together, gathered

Head = TypeVar("Head", bound=DenseHead[Any])
Sample = tuple[Tensor, Tensor]
"""An image [3, H, W] and its truth [H, W]."""
Sampler = Callable[[int, np.random.Generator | None], Sample]
Loss = Callable[[Tensor, Tensor, int], Tensor]
"""Of what a head tells [B, C, H, W] and the truth [B, H, W], at a step."""

LARGEST_GRADIENT = 35.0
"""Norm to which gradients are cut, as officially."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How a head is trained, whatever it tells.

    Source: dinov3/eval: AdamW, a linear warm-up and one cosine to zero. (Its scheduler also moves AdamW's first beta,
    which here stays 0.9. DINOv2 decays linearly.)

    Attributes:
        steps: Of the optimiser.
        batch_size: Images of a step, of all processes together.
        lr: The highest learning rate.
        weight_decay: Of AdamW.
        warmup: Steps until the highest learning rate; a third of all at most.
        seed: Decides the first weights, the order of the images and how they are changed.
        augment: Whether images are changed at random. Without, features are computed once and kept in memory, so that
            small data are trained on within seconds.
    """

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: int
    seed: int = 0
    augment: bool = True

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or self.lr <= 0 or min(self.weight_decay, self.warmup, self.seed) < 0:
            raise DataError(
                f"steps is {self.steps}, batch_size is {self.batch_size}, lr is {self.lr:g}, weight_decay is "
                f"{self.weight_decay:g}, warmup is {self.warmup} and seed is {self.seed}: give at least 1 step and "
                "image, a learning rate above 0, and nothing below 0."
            )

    def factor(self, step: int) -> float:
        """The share of the highest learning rate at a step."""
        warmup = min(self.warmup, self.steps // 3)
        return min(1.0, (step + 1) / (warmup + 1)) * (1 + math.cos(math.pi * step / self.steps)) / 2


def trained(
    make: Callable[[], Head],
    sample: Sampler,
    loss: Loss,
    *,
    device: torch.device,
    number: int,
    schedule: Schedule,
    workers: Workers,
) -> Head:
    """Train a head. Every process computes features of its share, and then all take the same step with all of them.

    Args:
        make: Makes the head.
        sample: Makes an image and its truth, changed at random if it is given a generator; sent to the workers.
        loss: What is made small.
        device: Where the head is.
        number: Of pictures.
        schedule: How it is trained.
        workers: Who computes.

    Raises:
        DataError: As from `sample`, or there are no pictures, or they do not fit together.
    """
    if number < 1:
        raise DataError("there are no pictures to train on: give at least one.")
    shown = workers.progress and workers.rank == 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # first weights and dropout
        torch.manual_seed(schedule.seed)
        head = make()
        head.train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
        scheduler = LambdaLR(optimizer, schedule.factor)
        batches = _Batches(head=head, sample=sample, number=number, schedule=schedule, workers=workers)
        for step, (features, truth) in enumerate(
            tqdm(batches.of_steps(), total=schedule.steps, unit="step", disable=not shown, leave=False)
        ):
            told = resized(head.read(features.to(device)), (truth.shape[-2], truth.shape[-1]))
            optimizer.zero_grad()
            loss(told, truth.to(device), step).backward()
            nn.utils.clip_grad_norm_(head.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            scheduler.step()
    return head.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batches:
    """Features [B, C, h, w] and truth [B, H, W] of every step."""

    head: DenseHead[Any]
    sample: Sampler
    number: int
    schedule: Schedule
    workers: Workers

    def of_steps(self) -> Iterator[Sample]:
        order = [places.tolist() for places in _order(self.number, self.schedule)]
        if not self.schedule.augment:
            every = range(self.number)
            size = self.schedule.batch_size
            parts = list(self._computed([list(every[start : start + size]) for start in every[::size]]))
            if len(shapes := sorted({tuple(truth.shape[1:]) for _, truth in parts})) > 1:
                sizes = " and ".join(f"{height} x {width}" for height, width in shapes[:2])
                raise DataError(f"the pictures have {sizes} pixels: give input_size, to make all of one size.")
            features, truth = (torch.cat([part[i] for part in parts]) for i in (0, 1))
            yield from ((features[places], truth[places]) for places in order)
        else:
            yield from self._computed(order)

    def _computed(self, order: list[list[int]]) -> Iterator[Sample]:
        """Yield features and truth of lists of images, of each of which every process computes its share."""
        rank, world_size = self.workers.rank, self.workers.world_size
        keys = [
            (step, place, indices[place])
            for step, indices in enumerate(order)
            for place in range(rank, len(indices), world_size)
        ]
        draw = _Draw(sample=self.sample, seed=self.schedule.seed, augment=self.schedule.augment)
        samples = made(draw, keys, num_workers=self.workers.num_workers)
        for indices in order:
            part = []
            with failing_together(world_size=world_size):
                found = [next(samples) for _ in range(rank, len(indices), world_size)]
                if len({image.shape for image, _ in found}) > 1:
                    raise DataError("the pictures are of several sizes: give input_size, to make all of one.")
                if found:
                    features = self.head.features(torch.stack([image for image, _ in found]))
                    features = features.cpu() if world_size > 1 or not self.schedule.augment else features
                    part = list(zip(features, (truth for _, truth in found), strict=True))
            parts = gathered(part, world_size=world_size)
            together = [parts[place % world_size][place // world_size] for place in range(len(indices))]
            yield torch.stack([features for features, _ in together]), torch.stack([truth for _, truth in together])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draw:
    """Makes the image of a place in a step, by draws that depend only on that."""

    sample: Sampler
    seed: int
    augment: bool

    def __call__(self, key: tuple[int, int, int]) -> Sample:
        step, place, index = key
        return self.sample(index, np.random.default_rng([self.seed, step, place]) if self.augment else None)


def _order(number: int, schedule: Schedule) -> Iterator[np.ndarray]:
    """Yield the images of every step: all in a random order, then all in another one, and so on."""
    rng = np.random.default_rng(schedule.seed)
    left = np.empty(0, dtype=np.int64)
    for _ in range(schedule.steps):
        while len(left) < schedule.batch_size:
            left = np.concatenate([left, rng.permutation(number)])
        yield left[: schedule.batch_size]
        left = left[schedule.batch_size :]
