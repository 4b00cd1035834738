"""The log of a run: JSON lines, trackers, and a progress bar or log lines."""

import difflib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitreg_hub.errors import BundleError, RecipeError
from vitreg_hub.files import METRICS_FILE, whole_file
from vitreg_hub.plotting import number
from vitreg_hub.training.recipes.settings import flat
from vitreg_hub.training.watch.curves import read_line
from vitreg_hub.training.watch.throughput import Throughput

logger = logging.getLogger(__name__)

TRACKERS_FOLDER = "trackers"
SHOWN = ("eval/", "raw/", "averaged/")


def require_trackers(
    names: Sequence[str], *, installed: Callable[[], Sequence[LoggerType]] = get_available_trackers
) -> None:
    """Check that accelerate knows all trackers and that they are installed.

    Raises:
        RecipeError: One is unknown or not installed.
    """
    missing = {str(kind) for kind in LoggerType} - {str(kind) for kind in installed()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            hint = f", did you mean {near[0]!r}" if near else ""
            raise RecipeError(
                f"watch.trackers: there is no tracker {name!r}{hint}: choose from {', '.join(LOGGER_TYPE_TO_CLASS)}."
            )
        if name in missing:
            raise RecipeError(
                f"watch.trackers: {name} is not installed: install its package, or leave it out; {METRICS_FILE} is "
                "always written."
            )


class Logbook:
    """The log of a run. Only the main process writes and shows anything; the others measure.

    On a terminal there is a progress bar, otherwise a log line for every call of `log`.

    Args:
        folder: The run's folder, for `metrics.jsonl` and the trackers' files.
        accelerator: Knows which process this is.
        start_step: Steps done before this process: later lines, and evaluations after that step, are dropped.
        name: Of the trackers' project.
        trackers: accelerate's trackers by name.
        config: Nested settings, which trackers get under dotted names.

    Raises:
        RecipeError: A tracker is unknown or not installed.
        BundleError: The folder cannot be written to.
    """

    def __init__(
        self,
        *,
        folder: str | Path,
        accelerator: Accelerator,
        total_steps: int,
        start_step: int = 0,
        throughput: Throughput,
        name: str = "run",
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        require_trackers(trackers)
        self.throughput, self._main, self._total = throughput, accelerator.is_main_process, total_steps
        self._file = Path(folder) / METRICS_FILE
        self._trackers: list[GeneralTracker] = []
        self._bar: tqdm | None = None
        self._closing = ExitStack()
        if not self._main:
            return
        with _writing(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            _drop_from(self._file, start_step)
        with self._closing:  # closes what was started before a failure
            for tracker in trackers:
                self._trackers.append(_start(tracker, name, Path(folder), config or {}))
                self._closing.callback(self._trackers[-1].finish)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=start_step, desc=name, unit="step", dynamic_ncols=True)
                self._closing.enter_context(logging_redirect_tqdm())
                self._closing.callback(self._bar.close)
            self._closing = self._closing.pop_all()

    def step_done(self) -> None:
        """Must be called after every step."""
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step of training, and show its main metrics, with the speed since the last call.

        The loop counts steps from 0; what is written and shown counts those that are done.

        Raises:
            BundleError: It cannot be written, as on a full disk.
        """
        metrics = {**metrics, **self.throughput.read(left=self._total - step - 1)}
        self._record(step + 1, metrics)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(_words(metrics)), refresh=False)
        elif self._main:
            done = f"step {step + 1}/{self._total} ({100 * (step + 1) / self._total:.0f} %)"
            words = [done, *_words(metrics)]
            if "eta_seconds" in metrics:
                words.append(f"ETA {tqdm.format_interval(metrics['eta_seconds'])}")
            logger.info("%s", "  ".join(words))

    def note(self, step: int, scores: Mapping[str, float], *, best: bool = False, below: float | None = None) -> None:
        """Write an evaluation after `step` steps, and show its scores, called ``eval/name``, and those besides.

        The many numbers about artifacts only go to files and trackers. Only the `best` model so far is called so, and
        if the run began with a better score, it is `below` that.

        Raises:
            BundleError: It cannot be written, as on a full disk.
        """
        if not scores:
            return
        self._record(step, {**scores, "best": True} if best else scores)
        words = [f"{name} {number(value)}" for name, value in scores.items() if name.startswith(SHOWN)]
        if self._main and words:
            if best:
                words.append(f"(the best so far{'' if below is None else f', below the start: {number(below)}'})")
            logger.info("%s", "  ".join([f"evaluation after {step} steps:", *words]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._main:
            return
        line = {"step": step, "time": round(time.time(), 3), **{name: _plain(v) for name, v in metrics.items()}}
        with _writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        for tracker in tuple(self._trackers):
            try:
                tracker.log(dict(metrics), step=step)
            except OSError as error:  # of its server or its files; the run still has metrics.jsonl
                name = tracker.name  # pyright: ignore[reportAttributeAccessIssue]  # every kind has one
                logger.warning("tracker %s failed and gets nothing more: %s", name, error)
                self._trackers.remove(tracker)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write {file}: {error.strerror or error}; the last checkpoint is still there, so make room and "
            "start the run again."
        ) from error


def _drop_from(file: Path, start_step: int) -> None:
    """Keep only complete lines of the steps that were done; an evaluation after the last of them is made again."""
    if file.exists():
        with file.open("rb") as old:
            lines = [(line, *read) for line in old if (read := read_line(line))]
        # a line of training has the number of steps after it; older versions gave those before it, so from 0 on
        ahead = not any(step == 0 and "loss" in values for _, step, values in lines)
        with whole_file(file, replace=True) as target, target.open("wb") as new:
            new.writelines(line for line, step, values in lines if step - (ahead and "loss" in values) < start_step)


def _start(name: str, project: str, folder: Path, config: Mapping[str, Any]) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(project, folder / TRACKERS_FOLDER) if kind.requires_logging_directory else kind(project)
    tracker.start()
    plain = {name: x if isinstance(x, int | float | str | None) else str(x) for name, x in flat(config).items()}
    tracker.store_init_configuration(plain)  # trackers take no lists
    return tracker


def _plain(value: float) -> float | str:
    """A number for JSON, which has none that are not finite: they become "nan", "inf" and "-inf"."""
    return value if math.isfinite(value) else str(float(value))


def _words(metrics: Mapping[str, float]) -> list[str]:
    """The main numbers, as far as they exist."""
    forms: dict[str, Callable[[float], str]] = {
        "loss": "loss {:.4g}".format,
        "lr": "lr {:.3g}".format,
        "images_per_second": lambda rate: f"{number(rate)} images/s",
        "data_wait": "{:.0%} waiting for data".format,
        "memory_gib": "{:.1f} GiB".format,
        "mfu": "MFU {:.1%}".format,
    }
    return [form(metrics[name]) for name, form in forms.items() if name in metrics]
