"""Samples of images and tokens that are the same however a data set is cut into batches and processes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max
"""Priority of what must not be sampled."""
MIN_TRAIN, MIN_TEST = 50, 20
"""With fewer samples than these, no probe is fitted or scored."""


def hashed(seed: int, *parts: Tensor) -> Tensor:
    """Pseudo-random integers from 0 up to `NEVER`, one for each combination of integers that broadcast together.

    They depend on the seed and the integers alone. Source: the finaliser of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", 2014), applied once for the seed and once for each part.
    """
    state = _mixed(np.array([seed], dtype=np.uint64))
    for part in parts:
        state = _mixed(state ^ part.cpu().numpy().astype(np.uint64))
    return torch.from_numpy((state >> np.uint64(1)).astype(np.int64))


def _mixed(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def is_test(indices: Tensor) -> Tensor:
    """Whether images [B] of these indices are for testing: one at random of every five consecutive ones.

    At random, because in many data sets the classes take turns.
    """
    return indices.cpu() % 5 == hashed(0, indices // 5) % 5


class Sample:
    """The items of smallest priority among all that were ever added, in any order and any portions.

    With priorities that are hashes of what an item is, this is a uniform sample without replacement that does not
    depend on batches or processes. At most twice `size` items are held at any time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._threshold = NEVER  # items of this priority or a larger one can no longer enter
        self._portions: list[tuple[Tensor, ...]] = []  # priorities and columns
        self._num_held = 0

    def __len__(self) -> int:
        return min(self._size, self._num_held)

    def __getstate__(self) -> dict[str, Any]:
        self._compact()  # else up to twice as much would be sent to other processes
        return self.__dict__

    def add(self, priorities: Tensor, *columns: Tensor) -> None:
        """Consider more items. Only those that enter are copied, to the CPU, floating point as float32.

        Args:
            priorities: [...] int64 on the CPU; items of priority `NEVER` do not exist.
            *columns: [..., *] what to keep of the items, on any device; the same columns every time.
        """
        places = torch.nonzero(priorities < self._threshold, as_tuple=True)
        if len(places[0]) > self._size:
            smallest = priorities[places].topk(self._size, largest=False).indices
            places = tuple(place[smallest] for place in places)
        if not len(places[0]):
            return
        kept = [column[places].cpu() for column in columns]
        self._portions.append((priorities[places], *(k.float() if k.is_floating_point() else k for k in kept)))
        self._num_held += len(places[0])
        if self._num_held >= 2 * self._size:
            self._compact()

    def merge(self, other: "Sample") -> None:
        """Consider everything that another sample holds."""
        for portion in other._portions:
            self.add(*portion)

    def result(self) -> tuple[Tensor, ...]:
        """Priorities [n] and columns [n, *], smallest priority first, that is in random order; () if it is empty."""
        self._compact()
        return self._portions[0] if self._portions else ()

    def _compact(self) -> None:
        if not self._portions:
            return
        order = torch.cat([priorities for priorities, *_ in self._portions]).argsort()[: self._size]
        self._portions = [tuple(torch.cat(column)[order] for column in zip(*self._portions, strict=True))]
        self._num_held = len(order)
        if len(order) == self._size:
            self._threshold = int(self._portions[0][0][-1])
