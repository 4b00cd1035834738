"""Classification by the nearest neighbours among labelled images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vitreg_hub.errors import DataError

KS = (10, 20, 100, 200)
"""Numbers of neighbours that vote, as DINO, DINOv2 and DINOv3 report them."""
TEMPERATURE = 0.07
TRAIN_TILE = 65_536
"""Labelled images that are compared with queries at once."""
SIMILARITIES = 2**26
"""Similarities that are held at once: 256 MiB."""
GROUP = 64
"""Neighbouring similarities of which only the largest is looked at first."""


def knn_votes(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    skip_first: bool = False,
) -> dict[int, Tensor]:
    """Votes of the nearest neighbours for each class, weighted by the softmax of cosine / temperature.

    One softmax runs over the largest k, so the votes of a smaller k sum to less than 1.

    Source: dinov3/eval/knn.py and dinov2/eval/knn.py.

    Args:
        train: Features [N, D] of any length. Half precision halves the memory; products are then taken in float32 on a
            CPU.
        train_labels: [N] int64, from 0.
        queries: [Q, D].
        num_classes: C.
        ks: Numbers of neighbours; those above N become N.
        temperature: Of the votes.
        skip_first: Leave out the nearest, for queries that are the labelled images themselves.

    Returns:
        Votes [Q, C] by k, in float32.

    Raises:
        DataError: A number makes no sense, or there is nothing to vote.
    """
    most = len(train) - skip_first
    if not (len(train) == len(train_labels) and most >= 1 and min(ks) >= 1 and temperature > 0):
        raise DataError(
            f"{len(train)} features with {len(train_labels)} labels, k {list(ks)} and temperature {temperature}: give "
            "at least one labelled feature, and numbers above 0."
        )
    if int(train_labels.min()) < 0 or int(train_labels.max()) >= num_classes:
        lowest, highest = int(train_labels.min()), int(train_labels.max())
        raise DataError(f"the labels go from {lowest} to {highest}: number {num_classes} classes from 0.")
    kept = sorted({min(k, most) for k in ks})
    largest = kept[-1] + skip_first
    train, queries = normalize(train, dim=1), normalize(queries.float(), dim=1)
    votes = {k: queries.new_zeros(len(queries), num_classes) for k in kept}
    rows = max(1, SIMILARITIES // min(len(train), TRAIN_TILE))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        cosines, places = _nearest(train, queries[part], largest)
        weights = (cosines[:, skip_first:] / temperature).softmax(dim=1)
        labels = train_labels.to(places.device)[places[:, skip_first:]]
        for k in kept:
            votes[k][part].scatter_add_(1, labels[:, :k], weights[:, :k])
    return votes


def _nearest(train: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest products [Q, k], sorted, and the places [Q, k] in train [N, D] where they are."""
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, len(train), TRAIN_TILE):
        tile = train[start : start + TRAIN_TILE]
        values, places = _largest(queries @ tile.to(queries.dtype).T, min(k, len(tile)))
        places = places + start
        if best is not None:
            values, places = torch.cat([best[0], values], dim=1), torch.cat([best[1], places], dim=1)
            values, order = values.topk(min(k, values.shape[1]))
            places = places.gather(1, order)
        best = values, places
    assert best is not None
    return best


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` in a fraction of its time where k is small: the k largest lie in the k groups of largest maxima."""
    whole = values.shape[1] // GROUP * GROUP
    if whole < 4 * k * GROUP:
        return values.topk(k)
    groups = values[:, :whole].unflatten(1, (-1, GROUP))
    chosen = groups.amax(dim=2).topk(k).indices
    inside = torch.arange(GROUP, device=values.device)
    places = (chosen[:, :, None] * GROUP + inside).flatten(1)
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    places = torch.cat([places, rest], dim=1)
    found, order = values.gather(1, places).topk(k)
    return found, places.gather(1, order)


def few_shot(labels: Tensor, *, per_class: float, seed: int = 0) -> Tensor:
    """Places, in order, of a random choice of labelled images that takes as many of every class.

    Source: dinov3/eval/data.py, whose random numbers these are.

    Args:
        labels: [N] int64.
        per_class: A number of images of each class (all, if there are fewer), or below 1 the share of them, at least
            one image.
        seed: Of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        number = max(int(len(places) * per_class), 1) if per_class < 1 else int(per_class)
        chosen.append(places[torch.randperm(len(places), generator=generator)[:number]])
    return torch.cat(chosen).sort().values
