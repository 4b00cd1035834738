"""Endless streams of shuffled samples that go on, after an interruption, exactly where they were."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from vitreg_hub.errors import DataError
from vitreg_hub.training.data.opening import UNREADABLE, reason
from vitreg_hub.training.data.samples import Piece, Sample, SampleReader
from vitreg_hub.training.distributed.randomness import seed_of

WHOLE_SHARDS = 2
"""Shards per reader from which on each reads its own ones only, even if some then have one more than others."""

REPORT_EVERY = 16
"""Unreadable images after which they are reported before the batch is full: it may never be."""


@dataclass(kw_only=True, slots=True)
class Position:
    """Where a reader is: all it takes to go on.

    Attributes:
        epoch: Passes that are done.
        block: Blocks of this epoch that are done.
        offset: Samples of this block that are done.
        drawn: Samples that were ever tried, the unreadable ones with them.
        rows: Where `datasets` was at the start of the block; None at the start of an epoch.
    """

    epoch: int = 0
    block: int = 0
    offset: int = 0
    drawn: int = 0
    rows: dict[str, Any] | None = None


class Stream(torch.utils.data.IterableDataset):
    """One reader's share of a stream, as pieces of batches, without end. Each piece carries the position after it.

    Readers are the workers of all processes. Each reads whole shards if there are enough for all or as many for each,
    else all rows, of which it keeps every n-th. So every row is read by one reader, once in each of its epochs. Shards
    come in another order in each epoch; rows are shuffled in blocks.

    Args:
        reader: Makes samples of rows.
        rows: All of them.
        batch_size: Images per piece.
        seed: Decides the order, and what the transform draws.
        repeats: Times that each row comes in a row.
        rank: Which of the processes this is.
        world_size: Number of processes.
        worker: Which of this process's readers this is.
        num_workers: Number of readers per process.
        position: Where to go on, as a piece told; None is the start.
    """

    def __init__(
        self,
        reader: SampleReader,
        rows: datasets.IterableDataset,
        *,
        batch_size: int,
        seed: int,
        repeats: int,
        rank: int,
        world_size: int,
        worker: int,
        num_workers: int,
        position: dict[str, Any] | None,
    ) -> None:
        self.reader, self.rows = reader, rows
        self.batch_size, self.seed, self.repeats = batch_size, seed, repeats
        self.key = (seed, rank, worker)
        self.number, self.num_readers = rank * num_workers + worker, world_size * num_workers
        self.position = position

    def __iter__(self) -> Iterator[Piece | DataError]:
        """Yield pieces; an error is yielded too: raised in a worker, it would arrive with a traceback in its text."""
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
                corrupt.append(sample.name)
            if len(samples) == self.batch_size:
                yield self.reader.piece(samples, corrupt, num_read, asdict(position))
                samples, corrupt, num_read = [], [], 0
            elif len(corrupt) == REPORT_EVERY:
                yield self.reader.piece([], corrupt, num_read)
                corrupt, num_read = [], 0

    def _rows(self, position: Position) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield rows and their numbers for ever; `position` moves along, and is behind the row that was yielded."""
        size, name = self.reader.data.shuffle_block, self.reader.data.name
        while True:
            data = self._epoch(position)
            rows = iter(data)
            block = _read(rows, size, name)
            if not block and position.rows is None:
                raise DataError(
                    f"{name} gives nothing to reader {self.number + 1} of {self.num_readers} (processes times "
                    "data.num_workers): there are too few images or shards, take fewer of those."
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
                        ahead += _read(rows, 1, name)  # one goes, one comes: no wait for a whole block
                    position.offset, position.drawn = i + 1, position.drawn + 1
                    yield row, position.block * size + int(place)
                block = ahead + _read(rows, size - len(ahead), name)
                position.block, position.offset, position.rows = position.block + 1, 0, after
            position.epoch, position.block, position.rows = position.epoch + 1, 0, None

    def _epoch(self, position: Position) -> datasets.IterableDataset:
        """This reader's rows of an epoch, from the block on at which it is."""
        data = self.rows
        whole = data.num_shards % self.num_readers == 0 or data.num_shards >= WHOLE_SHARDS * self.num_readers
        data = split_dataset_by_node(data, self.number, self.num_readers, "shards" if whole else "examples")
        # It is all that `datasets` seeds the order of the shards with. Of 31 bits, for it computes with it.
        data.set_epoch(seed_of(self.seed, position.epoch) % 2**31)
        if position.rows is not None:
            data.load_state_dict(position.rows)
        return data


def _read(rows: Iterator[dict[str, Any]], count: int, name: str) -> list[Any]:
    try:
        return list(islice(rows, count))
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read on: {reason(error)}.") from error
