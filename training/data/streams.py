"""Endless streams of shuffled samples that can be resumed exactly where they were."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from vitreg_hub.errors import DataError
from vitreg_hub.training.data.packed import UNREADABLE, reason
from vitreg_hub.training.data.samples import Piece, Sample, SampleReader
from vitreg_hub.training.distributed.randomness import seed_of

WHOLE_SHARDS = 2
"""Shards per reader from which on readers share out whole shards, even if some then get one more than others."""

REPORT_EVERY = 16
"""Unreadable images after which to report them even though the batch is not full: it may never be."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a reader is: everything it needs to go on.

    Attributes:
        epoch: Finished passes.
        block: Finished blocks of this epoch.
        offset: Finished samples of this block.
        drawn: Samples tried since the beginning, including unreadable ones.
        rows: Position of `datasets` at the start of the block; None at the start of an epoch.
    """

    epoch: int = 0
    block: int = 0
    offset: int = 0
    drawn: int = 0
    rows: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream(torch.utils.data.IterableDataset):
    """One reader's share of a stream, as an endless series of pieces. Each piece carries the position after it.

    Readers are the workers of all processes. Each reads its own shards if there are many, or equally many for all;
    otherwise each reads all rows and keeps every n-th. So every row is read by one reader, once per epoch. Shards are
    shuffled anew in each epoch; rows are shuffled in blocks.

    Attributes:
        repeats: How many times in succession each row is used.
        key: Key of this reader's random numbers.
        position: Where to go on, taken from a piece; None: at the start.
    """

    reader: SampleReader
    rows: datasets.IterableDataset
    batch_size: int
    seed: int
    repeats: int
    key: tuple[int, ...]
    number: int
    num_readers: int
    position: dict[str, Any] | None

    def __iter__(self) -> Iterator[Piece | DataError]:
        """Yield pieces, and errors too: raised in a worker, they would arrive with a traceback in their text."""
        try:
            yield from self._pieces(Position(**(self.position or {})))
        except DataError as error:
            yield error

    def _pieces(self, position: Position) -> Iterator[Piece]:
        samples, corrupt, num_read = [], [], 0
        for row, number in self._rows(position):
            sample = self.reader.read(row, number, (*self.key, position.drawn))
            num_read += 1
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                corrupt.append(sample)
            if len(samples) == self.batch_size:
                yield self.reader.piece(samples, corrupt, num_read, asdict(position))
                samples, corrupt, num_read = [], [], 0
            elif len(corrupt) == REPORT_EVERY:
                yield self.reader.piece([], corrupt, num_read)
                corrupt, num_read = [], 0

    def _rows(self, position: Position) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield rows and their numbers for ever, moving `position` to just after each row."""
        size, name = self.reader.data.shuffle_block, self.reader.data.name
        while True:
            data = self._epoch(position)
            rows = iter(data)
            block = _read(rows, size, name)
            if not block and position.rows is None:
                raise DataError(
                    f"{name} has nothing for reader {self.number + 1} of {self.num_readers} (processes times "
                    "data.num_workers): there are too few images or shards, use fewer readers."
                )
            while block:
                after, ahead = data.state_dict(), []
                order = np.random.default_rng(seed_of(*self.key, position.epoch, position.block)).permutation(
                    len(block)
                )
                for i in range(position.offset, len(block) * self.repeats):
                    place = order[i // self.repeats]
                    row = block[place]
                    if (i + 1) % self.repeats == 0:
                        block[place] = None
                        ahead += _read(rows, 1, name)  # reading ahead row by row avoids waiting for a whole block
                    position.offset, position.drawn = i + 1, position.drawn + 1
                    yield row, position.block * size + int(place)
                block = ahead + _read(rows, size - len(ahead), name)
                position.block, position.offset, position.rows = position.block + 1, 0, after
            position.epoch, position.block, position.rows = position.epoch + 1, 0, None

    def _epoch(self, position: Position) -> datasets.IterableDataset:
        """This reader's rows of an epoch, from its current block on."""
        data = self.rows
        whole = data.num_shards % self.num_readers == 0 or data.num_shards >= WHOLE_SHARDS * self.num_readers
        data = split_dataset_by_node(data, self.number, self.num_readers, "shards" if whole else "examples")
        # `datasets` seeds the order of shards with this alone, and computes with it, so it has 31 bits
        data.set_epoch(seed_of(self.seed, position.epoch) % 2**31)
        if position.rows is not None:
            data.load_state_dict(position.rows)
        return data


def _read(rows: Iterator[dict[str, Any]], count: int, name: str) -> list[Any]:
    try:
        return list(islice(rows, count))
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read any further: {reason(error)}.") from error
