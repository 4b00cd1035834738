"""What a model in training can do and what it looks like inside: k-NN accuracy, the task's scores, artifacts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitreg_hub.analysis.telemetry import telemetry
from vitreg_hub.errors import DataError
from vitreg_hub.images.source import ImageSource, Transform
from vitreg_hub.network.layout import evaluating
from vitreg_hub.tokens import observe
from vitreg_hub.training.recipes.settings import WatchSettings
from vitreg_hub.training.tasks.base import Scorer

QUERIES = 1024
"""Held-out images that are compared with all training images at once."""
EVALUATED_IMAGES = "evaluated_images"
"""Name of the number of held-out images that scores were sought of, among what an evaluation finds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What is known of some images of a source.

    Attributes:
        indices: Which images [B].
        labels: [B], -1 where one is missing.
        features: Normalised class tokens after the final norm [B, D]; None where no neighbours are sought.
        scores: [B] by name.
    """

    indices: Tensor
    labels: Tensor
    features: Tensor | None
    scores: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Share:
    """What one process found."""

    held_out: Sequence[_Seen] = ()
    train: Sequence[_Seen] = ()
    artifacts: Mapping[str, float]


def evaluate(
    model: nn.Module,
    scorer: Scorer | None,
    *,
    held_out: ImageSource,
    train: ImageSource | None,
    transform: Transform | None,
    device: torch.device,
    settings: WatchSettings,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Measure a copy of the published model, which keeps its modes; no global random number is drawn.

    All processes must call it, each with a whole model; they share the images and get the same numbers.

    Args:
        model: A ViT, on `device`.
        scorer: The task's scores. An image without a score has NaN there, and takes no part in its mean.
        held_out: Images that are not trained on.
        train: Images among which the neighbours of the held-out ones are sought, if both have labels; None: no k-NN.
        transform: Makes what the model takes of an image, without augmentation.
        device: Where this process computes.
        settings: How many images, and how.
        rank: Which of the processes this is.
        world_size: Number of processes.
        seed: Chooses the images, where there are more than asked for.
        batch_size: Images per process that are computed at once.
        num_workers: Further processes that decode.

    Returns:
        `eval/knn_accuracy` in [0, 1], `eval/<score>`, as `EVALUATED_IMAGES` the number of images that all processes
        together scored, and `artifacts/...` as `Telemetry.scalars` names them.

    Raises:
        DataError: An image cannot be read, by any of the processes, or the model is no ViT that can be read.
    """
    neighbours = train is not None and train.has_labels and held_out.has_labels

    def look(source: ImageSource, scorer: Scorer | None) -> list[_Seen]:
        if not settings.eval_images or not (neighbours or scorer):
            return []
        reading = {"batch_size": batch_size, "num_workers": num_workers, "rank": rank, "world_size": world_size}
        reading["skip_unreadable"] = True
        seen = []
        for batch in _capped(source, settings.eval_images, seed).batches(transform, **reading):
            labels = torch.full_like(batch.indices, -1) if batch.labels is None else batch.labels
            images = batch.images.to(device)
            with evaluating(model):
                scores = scorer(images, labels.to(device)) if scorer else {}
            seen.append(
                _Seen(
                    indices=batch.indices,
                    labels=labels,
                    features=class_features(model, images).cpu() if neighbours else None,
                    scores={name: score.float().cpu() for name, score in scores.items()},
                )
            )
        return seen

    def share() -> _Share | DataError:
        try:
            return _Share(
                held_out=look(held_out, scorer),
                train=look(train, None) if neighbours else [],
                artifacts=_artifacts(model, held_out, transform, settings, seed) if rank == 0 else {},
            )
        except DataError as error:  # raised here, it would leave the other processes waiting
            return error

    shares = _gathered(share(), world_size)
    if error := next((found for found in shares if isinstance(found, DataError)), None):
        raise error
    return _results(shares, settings, device)


def class_features(model: nn.Module, images: Tensor) -> Tensor:
    """Class tokens after the final norm, of length 1: [B, D] float32 of images [B, 3, H, W]."""
    return normalize(observe(model, images, normed=True).normed.cls[:, 0].float(), dim=1)


def knn_classes(features: Tensor, *, train: Tensor, labels: Tensor, neighbors: int, temperature: float) -> Tensor:
    """Classes [Q] by the votes of the nearest neighbours, each weighted by exp(cosine / temperature).

    Source: dinov2/eval/knn.py; the softmax over more neighbours than vote, which it takes, changes no class.

    Args:
        features: [Q, D] of length 1.
        train: [T, D] of length 1.
        labels: [T], from 0.
        neighbors: Votes; all if there are fewer.
        temperature: Of the votes.
    """
    chosen = []
    for queries in features.split(QUERIES):
        cosines, places = (queries @ train.T).topk(min(neighbors, len(train)))
        votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[places], (cosines / temperature).softmax(dim=1))
        chosen.append(votes.argmax(dim=1))
    return torch.cat(chosen)


def _results(shares: Sequence[_Share], settings: WatchSettings, device: torch.device) -> dict[str, float]:
    results = {}
    held_out = _joined([seen for share in shares for seen in share.held_out])
    train = _joined([seen for share in shares for seen in share.train])
    if held_out and train and (held_out.labels >= 0).any() and (train.labels >= 0).any():
        asked, known = held_out.labels >= 0, train.labels >= 0
        found = knn_classes(
            held_out.features[asked].to(device),
            train=train.features[known].to(device),
            labels=train.labels[known].to(device),
            neighbors=settings.knn_neighbors,
            temperature=settings.knn_temperature,
        )
        results["eval/knn_accuracy"] = (found.cpu() == held_out.labels[asked]).double().mean().item()
    for name, scores in held_out.scores.items() if held_out else ():
        if not scores.isnan().all():
            results[f"eval/{name}"] = scores.double().nanmean().item()
    if results:
        results[EVALUATED_IMAGES] = len(held_out.indices)
    for share in shares:
        results |= share.artifacts
    return results


def _artifacts(
    model: nn.Module, source: ImageSource, transform: Transform | None, settings: WatchSettings, seed: int
) -> dict[str, float]:
    if not settings.artifact_images:
        return {}
    source = _capped(source, settings.artifact_images, seed)
    batch = next(source.batches(transform, batch_size=settings.artifact_images, skip_unreadable=True), None)
    if batch is None:
        return {}
    return telemetry(model, batch.images, cutoff=settings.cutoff).scalars()


def _capped(source: ImageSource, most: int, seed: int) -> ImageSource:
    """A source with no more than `most` images: a random subset, in order, or the first ones of a stream."""
    if source.picked is None:
        return replace(source, rows=source.rows.take(most))
    if len(source.picked) <= most:
        return source
    places = np.sort(np.random.default_rng(seed).choice(len(source.picked), most, replace=False))
    return replace(source, picked=[source.picked[place] for place in places], num_images=most)


def _gathered(mine: _Share | DataError, world_size: int) -> list[_Share | DataError]:
    """What every process found, in the order of their ranks."""
    if world_size == 1:
        return [mine]
    shares: list[_Share | DataError | None] = [None] * world_size
    torch.distributed.all_gather_object(shares, mine)
    return shares


def _joined(parts: Sequence[_Seen]) -> _Seen | None:
    """All images in the order of their indices, so that the number of processes changes no sum; None of none."""
    if not parts:
        return None
    order = torch.cat([part.indices for part in parts]).argsort()

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors))[order]

    return _Seen(
        indices=join([part.indices for part in parts]),
        labels=join([part.labels for part in parts]),
        features=None if parts[0].features is None else join([part.features for part in parts]),
        scores={name: join([part.scores[name] for part in parts]) for name in parts[0].scores},
    )
