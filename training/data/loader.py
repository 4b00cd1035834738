"""One process's share of global batches. The content of a batch depends on the seed and the step alone."""

import signal
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

import datasets
import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset

from vitreg_hub.errors import DataError, RecipeError, VitregError
from vitreg_hub.images.data_sets import why_unlabelled
from vitreg_hub.images.source import unchanged
from vitreg_hub.training.data.opening import TrainingData
from vitreg_hub.training.data.samples import Piece, Sample, SampleReader, Transform
from vitreg_hub.training.data.streams import Position, Stream
from vitreg_hub.training.distributed.randomness import seed_of
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.tasks.settings import Need

TRIES = 16
"""Images to try in place of an unreadable one."""

MIN_CORRUPT = 3
"""Least number of unreadable images that can be too many before the whole set is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorruptState:
    """How many images were tried, how many could not be read, and the names of those."""

    read: Annotated[int, Field(ge=0)]
    unreadable: Annotated[int, Field(ge=0)]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """What `TrainLoader.state` gives, as a checkpoint keeps it; `positions` are those of a stream's readers."""

    step: Annotated[int, Field(ge=0)]
    pieces: Annotated[int, Field(ge=0)]
    corrupt: CorruptState
    readers: Annotated[int, Field(ge=1)]
    positions: tuple[Position | None, ...] | None

    def __post_init__(self) -> None:
        """Refuse positions of another number of readers."""
        if self.positions is not None and len(self.positions) != self.readers:
            raise VitregError(f"{self.readers} readers have {len(self.positions)} positions")


class TrainLoader:
    """Reads the batches of one process.

    Rows read by number: an epoch is a permutation from (seed, epoch) without its last incomplete batch, and the image
    at position p of step s is seeded by (seed, s, p). Nothing depends on workers, processes or where a run began.
    Streams: see `Stream`; the batches depend on the number of processes and workers, and only `state` can resume them.

    Args:
        transform: Makes views of an RGB image; draws from the global generators.
        batch_size: Images of a step, over all processes and accumulated parts.
        accumulate: Parts into which a process divides a step, one after the other.
        repeats: How many times in succession each image is used. An epoch keeps its number of steps, so it contains
            fewer images. Source: deit/samplers.py, `RASampler`.
        max_corrupt: Share of unreadable images above which to stop.
        needs: What every row must have; where it is not needed, a label may be -1 and a caption empty.

    Raises:
        RecipeError: Numbers contradict each other.
        DataError: There are too few images, or no labels or captions where they are needed.
    """

    def __init__(
        self,
        *,
        data: TrainingData,
        transform: Transform,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        repeats: int = 1,
        num_workers: int = 0,
        max_corrupt: float = 0.01,
        needs: Collection[Need] = (),
    ) -> None:
        parts = world_size * accumulate
        if batch_size % parts:
            raise RecipeError(
                f"batch_size is {batch_size}, which {world_size} processes times scale.accumulate {accumulate} do not "
                f"divide: give a multiple of {parts}."
            )
        require_needs(data, needs)
        if data.num_images is not None and data.num_images < batch_size:
            raise DataError(
                f"{data.name} has {data.num_images} images, which is less than one batch: give a batch_size of at most "
                f"{data.num_images // parts * parts or parts} instead of {batch_size}."
            )
        self.data, self.batch_size, self.seed, self.repeats = data, batch_size, seed, repeats
        self.rank, self.world_size, self.accumulate, self.num_workers = rank, world_size, accumulate, num_workers
        self._reader = SampleReader(data=data, transform=transform, needs=frozenset(needs))
        self._corrupt = _CorruptCount(data, max_corrupt)
        self._next_step, self._num_pieces = 0, 0
        self._positions: list[dict[str, Any] | None] = [None] * self._num_readers

    @property
    def _num_readers(self) -> int:
        return max(1, self.num_workers)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the images, without repeats.

        Raises:
            DataError: It is a stream that does not say its length.
        """
        if self.data.num_images is None:
            raise DataError(
                f"{self.data.name} is a stream that does not say how many images it has: give data.stream_images, or "
                "epoch_steps."
            )
        return self.data.num_images // self.batch_size

    @property
    def num_corrupt(self) -> int:
        """Unreadable images that this process has found so far."""
        return len(self._corrupt.names)

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Yield this process's `accumulate` batches of every step before `stop_step`.

        Workers live as long as the iteration. A stream can only begin at its current step.

        Raises:
            DataError: Too many images cannot be read, labels or captions are missing or wrong, or a stream is not at
                `start_step`.
        """
        if self.data.is_stream and start_step != self._next_step:
            raise DataError(
                f"{self.data.name} is a stream at step {self._next_step} and cannot begin at step {start_step}: go on "
                "from a checkpoint, or start anew."
            )
        rows = self.data.rows
        if isinstance(rows, datasets.Dataset):
            pieces = self._looked_up(rows, start_step, stop_step)
        else:
            pieces = self._streamed(rows)
        with closing(pieces):
            for step in range(start_step, stop_step):
                for part in range(self.accumulate):
                    piece, corrupt = self._next_piece(pieces)
                    self._next_step = step + (part == self.accumulate - 1)
                    yield Batch(
                        step=step,
                        positions=torch.from_numpy(self._share(part)),
                        names=tuple(piece.names),
                        crops=tuple(piece.crops),
                        labels=piece.labels,
                        texts=None if piece.texts is None else tuple(piece.texts),
                        corrupt=tuple(corrupt),
                    )

    def state(self) -> dict[str, Any]:
        """This process's place in the data after the batches it has yielded, JSON-safe; to be called between steps."""
        return {
            "step": self._next_step,
            "pieces": self._num_pieces,
            "corrupt": self._corrupt.state(),
            "readers": self._num_readers,
            "positions": list(self._positions) if self.data.is_stream else None,
        }

    def load_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run was, by the `state` of each of its processes, in their order.

        Raises:
            DataError: It is a stream, and the run had another number of processes or workers, or no stream.
        """
        state = states[self.rank % len(states)]
        there, here = state["positions"] is not None, self.data.is_stream
        if there != here or (here and (len(states), state["readers"]) != (self.world_size, self._num_readers)):
            raise DataError(
                f"the checkpoint comes from {_tell(there, len(states), state['readers'])}, but this run has "
                f"{_tell(here, self.world_size, self._num_readers)}: a stream goes on with the same numbers only."
            )
        self._next_step, self._num_pieces = state["step"], state["pieces"]
        self._corrupt.load_state(state["corrupt"])
        if here:
            self._positions = list(state["positions"])

    def _share(self, part: int) -> np.ndarray:
        """Positions in the global batch [b] of one part of this process, sorted.

        Positions i and B - 1 - i are always in the same part and at opposite places. Mixup and cutmix pair images that
        way, so they give the same in parts as on the whole batch. Source: timm/data/mixup.py, `Mixup`.
        """
        position = np.arange(self.batch_size)
        pairs = np.where(position % 2, self.batch_size - 1 - position // 2, position // 2)  # 0, B - 1, 1, B - 2, ...
        size = self.batch_size // (self.world_size * self.accumulate)
        chunk = part * self.world_size + self.rank
        return np.sort(pairs[chunk * size : (chunk + 1) * size])

    def _next_piece(self, pieces: Iterator[Piece | DataError]) -> tuple[Piece, list[str]]:
        """The next piece with images, and the newly found unreadable ones."""
        corrupt = []
        while True:
            piece = next(pieces)
            if isinstance(piece, DataError):
                raise piece
            corrupt += self._corrupt.add(piece)
            if piece.crops:
                return piece, corrupt

    def _looked_up(self, rows: datasets.Dataset, start_step: int, stop_step: int) -> Generator[Piece | DataError]:
        draws = self._draws(len(rows), start_step, stop_step)
        yield from _in_workers(_Rows(self._reader, rows, self.seed), self.num_workers, batch_sampler=draws)

    def _draws(self, num_rows: int, start_step: int, stop_step: int) -> Iterator[list[tuple[int, int, int]]]:
        """Yield (step, position, row) of all images of each piece."""
        known, order = None, np.empty(0, dtype=int)
        for step in range(start_step, stop_step):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != known:
                known = epoch
                order = np.random.default_rng(seed_of(self.seed, epoch)).permutation(num_rows)
            for part in range(self.accumulate):
                positions = self._share(part)
                rows = order[(step_of_epoch * self.batch_size + positions) // self.repeats]
                yield [(step, int(position), int(row)) for position, row in zip(positions, rows, strict=True)]

    def _streamed(self, rows: datasets.IterableDataset) -> Generator[Piece | DataError]:
        """Take from the readers in turn. Each has its own torch loader, so that a run can resume at any of them."""
        readers = []
        for worker, position in enumerate(self._positions):
            stream = Stream(
                reader=self._reader,
                rows=rows,
                batch_size=self.batch_size // (self.world_size * self.accumulate),
                seed=self.seed,
                repeats=self.repeats,
                key=(self.seed, self.rank, worker),
                number=self.rank * self._num_readers + worker,
                num_readers=self.world_size * self._num_readers,
                position=position,
            )
            readers.append(iter(_in_workers(stream, min(1, self.num_workers), batch_size=None)))
        while True:
            worker = self._num_pieces % len(readers)
            piece = next(readers[worker])
            if isinstance(piece, Piece) and piece.crops:
                self._positions[worker], self._num_pieces = piece.position, self._num_pieces + 1
            yield piece


def require_needs(data: TrainingData, needs: Collection[Need]) -> None:
    """Check that data have a column of everything that is needed.

    Raises:
        DataError: One is missing.
    """
    for need, there in (("labels", data.has_labels), ("texts", data.has_texts)):
        if need in needs and not there:
            if data.folder is not None and need == "labels":
                why = why_unlabelled(data.folder)
                raise DataError(f"the images of {data.name} have no classes, which this task needs: {why}.")
            raise DataError(
                f"{data.name} has no {need}, which this task needs: name their column as data.{need[:-1]}_column, its "
                f"columns are {', '.join(data.columns)}."
            )


def _in_workers(samples: Dataset, num_workers: int, **batching: Any) -> DataLoader:
    return DataLoader(
        samples,
        num_workers=num_workers,
        collate_fn=unchanged,
        worker_init_fn=outlive_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise it would use the global one
        **batching,
    )


def outlive_signals(worker: int) -> None:
    """Ignore SIGTERM and Ctrl-C, sent to all processes of a job, of which the main one then writes a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Rows(Dataset):
    """Runs in the workers where rows are read by number."""

    def __init__(self, reader: SampleReader, rows: datasets.Dataset, seed: int) -> None:
        self.reader, self.rows, self.seed = reader, rows, seed

    def __getitems__(self, draws: Sequence[tuple[int, int, int]]) -> Piece | DataError:
        try:
            return self._piece(draws)
        except DataError as error:
            return error

    def _piece(self, draws: Sequence[tuple[int, int, int]]) -> Piece | DataError:
        """Samples of all rows, with another row in place of each that cannot be read."""
        samples, corrupt = [], []
        for step, position, number in draws:
            for attempt in range(TRIES + 1):
                if attempt:
                    number = seed_of(self.seed, step, position, attempt) % len(self.rows)
                sample = self.reader.read(self.rows[number], number, (self.seed, step, position))
                if isinstance(sample, Sample):
                    samples.append(sample)
                    break
                corrupt.append(sample)
            else:
                return self.reader.piece([], corrupt, len(samples) + len(corrupt))
        return self.reader.piece(samples, corrupt, len(samples) + len(corrupt))


class _CorruptCount:
    """Counts unreadable images and raises an error when they are too many.

    They are too many if they exceed the allowed share of the whole set. Before that is certain, they are too many if
    there are at least `MIN_CORRUPT` and their share of the images read so far lies three standard deviations above the
    allowed one, so that a good set is not refused because of bad luck at its start.
    """

    def __init__(self, data: TrainingData, max_corrupt: float) -> None:
        self.data, self.max_corrupt = data, max_corrupt
        self.num_read, self.num_unreadable = 0, 0
        self.names: dict[str, None] = {}

    def add(self, piece: Piece) -> list[str]:
        """Count a piece's images and return the names that are new."""
        new = [name for name in dict.fromkeys(piece.corrupt) if name not in self.names]
        self.names |= dict.fromkeys(new)
        self.num_read += piece.num_read
        self.num_unreadable += len(piece.corrupt)
        hopeless = not (piece.crops or self.data.is_stream)  # every try for one position has failed
        if hopeless or (piece.corrupt and self._too_many()):
            first = ", ".join(list(self.names)[:3])
            share = self.num_unreadable / self.num_read
            raise DataError(
                f"{len(self.names)} images of {self.data.name} cannot be read, {share:.1%} of those that were tried, "
                f"where data.max_corrupt allows {self.max_corrupt:.1%} (first: {first}): replace or remove them."
            )
        return new

    def _too_many(self) -> bool:
        known, allowed = len(self.names), self.max_corrupt * self.num_read
        surely = self.data.num_images is not None and known > self.max_corrupt * self.data.num_images
        likely = known >= MIN_CORRUPT and self.num_unreadable > allowed + 3 * allowed**0.5
        return surely or likely

    def state(self) -> dict[str, Any]:
        return {"read": self.num_read, "unreadable": self.num_unreadable, "names": list(self.names)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_read, self.num_unreadable = state["read"], state["unreadable"]
        self.names = dict.fromkeys(state["names"])


def _tell(stream: bool, processes: int, readers: int) -> str:
    kind = "a stream" if stream else "data read by number"
    return f"{kind} with {processes} processes of {readers} readers (data.num_workers)"
