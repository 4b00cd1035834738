"""Linear probes: many linear classifiers on frozen features, trained at once, of which the best is chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from tqdm import tqdm

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.features import Features, Pool

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates for 256 images a step."""
MOST_STEPS = 12_500
"""10 epochs of 1,250 steps, as DINOv2 trains on ImageNet."""
MOST_EPOCHS = 100
"""Where there are few images, more passes over them add nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One cell of the grid: what a classifier reads, and how fast it learns.

    Attributes:
        pool: Tokens of which the feature is made.
        blocks: Last blocks whose class tokens are read.
        rate: Learning rate for 256 images a step.
    """

    pool: Pool
    blocks: int
    rate: float

    def __str__(self) -> str:
        return f"{self.pool}, {self.blocks} block{'s' * (self.blocks > 1)}, learning rate {self.rate:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSettings:
    """How linear probes are trained.

    Source: dinov3/eval/linear.py and dinov2/eval/linear.py.

    Attributes:
        rates: Learning rates for 256 images a step; they are scaled with the batch.
        blocks: Numbers of last blocks whose class tokens are read.
        pools: What is read; None: the class token, and each of patches and registers beside it.
        batch_size: Images a step.
        steps: None: 12,500, or 100 passes over the images if that is less.
        optimizer: "sgd" (momentum 0.9) or "adamw", without weight decay.
        schedule: "cosine" to 0, or "one_cycle".
        seed: Of first weights and the order of the images.
    """

    rates: tuple[float, ...] = RATES
    blocks: tuple[int, ...] = (1, 4)
    pools: tuple[Pool, ...] | None = None
    batch_size: int = 128
    steps: int | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "one_cycle"] = "cosine"
    seed: int = 0

    def steps_for(self, num_images: int) -> int:
        """Steps for so many training images."""
        return self.steps or max(1, min(MOST_STEPS, MOST_EPOCHS * num_images // self.batch_size))

    def grid(self, features: Features) -> tuple[Probe, ...]:
        """All probes that can be trained on these features."""
        wanted: tuple[Pool, ...] = self.pools or ("class", "class+patches", "class+registers")
        pools: list[Pool] = [pool for pool in wanted if pool in features.pools] or [features.default_pool]
        depths = sorted({min(number, max(1, features.cls.shape[1])) for number in self.blocks})
        return tuple(
            Probe(pool=pool, blocks=number, rate=rate) for number in depths for pool in pools for rate in self.rates
        )


def new_heads(
    features: Features, probes: Iterable[Probe], *, num_classes: int, seed: int = 0
) -> dict[Probe, nn.Linear]:
    """A linear classifier for each probe: weights from N(0, 0.01), biases 0."""
    generator = torch.Generator().manual_seed(seed)
    heads = {}
    for probe in probes:
        width = features[:1].pooled(probe.pool, blocks=probe.blocks).shape[1]
        heads[probe] = nn.Linear(width, num_classes)
        nn.init.normal_(heads[probe].weight, std=0.01, generator=generator)
        nn.init.zeros_(heads[probe].bias)
    return heads


def random_batches(features: Features, *, batch_size: int, steps: int, seed: int = 0) -> Iterable[Features]:
    """Yield batches without end of passes: every image once in each pass, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(places) < batch_size:
            places = torch.cat([places, torch.randperm(len(features), generator=generator)])
        yield features[places[:batch_size]]
        places = places[batch_size:]


def train_heads(
    heads: Mapping[Probe, nn.Linear],
    batches: Iterable[Features],
    *,
    steps: int,
    settings: LinearSettings | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Train all classifiers in place, each on its own features of the same batches.

    Args:
        heads: From `new_heads`; moved to the device.
        batches: Labelled features: of a table (`random_batches`), or of an augmented stream.
        steps: Number of batches, over which the learning rates fall.
        settings: How; the defaults are DINOv2's.
        device: Where they train.
        progress: Show a progress bar.

    Returns:
        Losses [steps, heads], before each step.
    """
    settings = settings or LinearSettings()
    scale = settings.batch_size / 256
    groups = [{"params": list(head.to(device).parameters()), "lr": probe.rate * scale} for probe, head in heads.items()]
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    if settings.schedule == "one_cycle":
        schedule = OneCycleLR(optimizer, max_lr=[group["lr"] for group in groups], total_steps=steps)
    else:
        schedule = CosineAnnealingLR(optimizer, steps)
    losses = []
    for batch in tqdm(batches, total=steps, desc="linear probes", unit="step", disable=not progress, leave=False):
        labels = batch.labels.to(device)
        logits = all_logits(heads, batch, device=device)
        loss = torch.stack([cross_entropy(logit, labels) for logit in logits.values()])
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def all_logits(
    heads: Mapping[Probe, nn.Linear], features: Features, *, device: torch.device | str = "cpu"
) -> dict[Probe, Tensor]:
    """Logits [N, C] of every classifier; those that read the same feature are one product."""
    by_input: dict[tuple[Pool, int], list[Probe]] = {}
    for probe in heads:
        by_input.setdefault((probe.pool, probe.blocks), []).append(probe)
    logits = {}
    for (pool, blocks), probes in by_input.items():
        inputs = features.pooled(pool, blocks=blocks).to(device, torch.float32)
        weight = torch.cat([heads[probe].weight for probe in probes])
        bias = torch.cat([heads[probe].bias for probe in probes])
        out = nn.functional.linear(inputs, weight, bias)
        logits |= dict(zip(probes, out.tensor_split(len(probes), dim=1), strict=True))
    return {probe: logits[probe] for probe in heads}


@torch.no_grad()
def accuracies(
    heads: Mapping[Probe, nn.Linear], features: Features, *, device: torch.device | str = "cpu", chunk: int = 4096
) -> dict[Probe, float]:
    """Share of the labelled images whose class each classifier tells."""
    hits = dict.fromkeys(heads, 0)
    for start in range(0, len(features), chunk):
        part = features[slice(start, start + chunk)]
        labels = part.labels.to(device)
        for probe, logits in all_logits(heads, part, device=device).items():
            hits[probe] += int((logits.argmax(dim=1) == labels).sum())
    return {probe: count / len(features) for probe, count in hits.items()}


def best_probe(scores: Mapping[Probe, float]) -> Probe:
    """The first of the best.

    Raises:
        DataError: There is none.
    """
    if not scores:
        raise DataError("there are no linear probes to choose from.")
    return max(scores, key=lambda probe: scores[probe])
