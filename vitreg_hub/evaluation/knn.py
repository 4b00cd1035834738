"""Classification by the nearest neighbours among labelled images."""

import torch
from torch import Tensor

QUERIES = 1024
"""Images that are compared with all labelled ones at once."""


def knn_classes(features: Tensor, *, train: Tensor, labels: Tensor, neighbors: int, temperature: float) -> Tensor:
    """Classes [Q] by the votes of the nearest neighbours, each weighted by exp(cosine / temperature).

    Source: dinov2/eval/knn.py, whose softmax covers more neighbours than vote; this changes no class.

    Args:
        features: [Q, D] of length 1.
        train: [T, D] of length 1.
        labels: [T], from 0.
        neighbors: How many vote; all if there are fewer.
        temperature: Of the votes.
    """
    chosen = []
    for queries in features.split(QUERIES):
        cosines, places = (queries @ train.T).topk(min(neighbors, len(train)))
        votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[places], (cosines / temperature).softmax(dim=1))
        chosen.append(votes.argmax(dim=1))
    return torch.cat(chosen)
