"""Compare callables fairly: in turns, in one process, by the ratio of medians."""

import statistics
import time
from collections.abc import Callable, Mapping


def medians(contestants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds per call. A round calls each contestant once, so that a slow moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(warmup + rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(title: str, seconds: Mapping[str, float]) -> str:
    """Markdown table whose first row is ours; ratios are ours over theirs, below 1 is faster."""
    ours = next(iter(seconds.values()))
    rows = [f"| {title} | seconds | ours / this |", "|---|---|---|"]
    rows += [f"| {name} | {value:.3f} | {ours / value:.2f} |" for name, value in seconds.items()]
    return "\n".join(rows)
