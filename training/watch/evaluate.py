"""Evaluation of a model in training: k-NN accuracy, the task's scores, artifacts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitreg_hub.analysis.telemetry import telemetry
from vitreg_hub.evaluation.knn import knn_votes
from vitreg_hub.images.source import ImageSource, Transform
from vitreg_hub.network.layout import evaluating
from vitreg_hub.passes import Needs, failing_together, gathered, in_order, observed
from vitreg_hub.training.recipes.settings import WatchSettings
from vitreg_hub.training.tasks.base import Scorer

EVALUATED_IMAGES = "evaluated_images"
"""Name under which an evaluation returns the number of held-out images that it scored."""


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
    """Evaluate a copy of the published model, without changing its modes or drawing global random numbers.

    All processes must call it, each with a whole model; they divide the images and get the same numbers.

    Args:
        model: A ViT, on `device`.
        scorer: The task's scores. NaN means that an image has no score; it does not count in the mean.
        train: Images among which k-NN finds neighbours of the held-out ones, if both have labels; None: no k-NN.
        transform: Makes the model's input of an image, without augmentation.
        seed: Chooses images, where there are too many.

    Returns:
        `eval/knn_accuracy` in [0, 1], `eval/<score>`, under `EVALUATED_IMAGES` the number of images that all processes
        scored together, and `artifacts/...` as named by `Telemetry.scalars`.

    Raises:
        DataError: A process cannot read an image, or the model is not a ViT of a known kind.
    """
    neighbours = train is not None and train.has_labels and held_out.has_labels

    def rows(source: ImageSource, scorer: Scorer | None) -> Mapping[str, Tensor]:
        """Labels, features and scores of the images of a source; empty if none are needed."""
        if not settings.eval_images or not (neighbours or scorer):
            return {}
        batches = source.at_most(settings.eval_images, seed=seed).batches(
            transform,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            skip_unreadable=True,
        )
        parts = []
        with failing_together(world_size=world_size):
            for seen, batch in observed(model, batches, Needs(normed=neighbours)):
                labels = torch.full_like(batch.indices, -1) if batch.labels is None else batch.labels
                columns = {"indices": batch.indices, "labels": labels}
                if neighbours:
                    columns["features"] = normalize(seen.normed.cls[:, 0].float(), dim=1)
                if scorer:
                    with evaluating(model):
                        scores = scorer(batch.images, labels.to(device))
                    columns |= {f"eval/{name}": score.float() for name, score in scores.items()}
                parts.append({name: column.cpu() for name, column in columns.items()})
        return in_order(part for share in gathered(parts, world_size=world_size) for part in share)

    results = {}
    found = rows(held_out, scorer)
    if train is not None and neighbours:
        results |= _knn_accuracy(found, rows(train, None), settings, device)
    for name, scores in found.items():
        if name.startswith("eval/") and not scores.isnan().all():
            results[name] = scores.double().nanmean().item()
    if results:
        results[EVALUATED_IMAGES] = len(found["indices"])
    artifacts = {}
    with failing_together(world_size=world_size):
        if rank == 0 and settings.artifact_images:
            some = held_out.at_most(settings.artifact_images, seed=seed)
            batch = next(some.batches(transform, batch_size=settings.artifact_images, skip_unreadable=True), None)
            if batch is not None:
                artifacts = telemetry(model, batch.images, cutoff=settings.cutoff).scalars()
    return results | gathered(artifacts, world_size=world_size)[0]


def _knn_accuracy(
    held_out: Mapping[str, Tensor], train: Mapping[str, Tensor], settings: WatchSettings, device: torch.device
) -> dict[str, float]:
    """Share of labelled held-out images that get their own label; empty if either source has no labels."""
    if not (held_out and train):
        return {}
    asked, known = held_out["labels"] >= 0, train["labels"] >= 0
    if not (asked.any() and known.any()):
        return {}
    [votes] = knn_votes(
        train["features"][known].to(device),
        train["labels"][known].to(device),
        held_out["features"][asked].to(device),
        num_classes=1 + int(train["labels"].max()),
        ks=(settings.knn_neighbors,),
        temperature=settings.knn_temperature,
    ).values()
    classes = votes.argmax(dim=1)
    return {"eval/knn_accuracy": (classes.cpu() == held_out["labels"][asked]).double().mean().item()}
