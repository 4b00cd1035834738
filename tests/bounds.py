"""The time and memory that small files of strangers may take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, MEGABYTES = 2, 500
RESET = Path("/proc/self/clear_refs")


def peak() -> int:
    """The most memory of this process since its last reset, in kB."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


@contextmanager
def within_bounds() -> Iterator[None]:
    """Look that a block keeps the bounds; in CPU time of this thread, as other processes may keep it waiting."""
    if RESET.exists():
        RESET.write_text("5")
    before, start = peak() if RESET.exists() else 0, time.thread_time()
    yield
    assert time.thread_time() - start < SECONDS
    assert not RESET.exists() or peak() - before < MEGABYTES * 1024
