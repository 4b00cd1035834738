"""Randomness without state: what is drawn depends only on a key, such as (seed, step, position)."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*key: int) -> int:
    """A seed of 64 bits for a key of numbers from 0, practically independent of the seeds of other keys.

    Keys of different lengths differ: (1, 2) is not (1, 2, 0).
    """
    # used as plain entropy, short keys would be padded with zeros
    return int(np.random.SeedSequence(len(key), spawn_key=key).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) by `key`, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more bits
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
