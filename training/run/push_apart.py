"""`hub.push` in a process of its own: the request goes in as JSON, the outcome comes out as JSON."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from threading import Event
from typing import Any, Literal

from pydantic import TypeAdapter

from vitreg_hub.environment import duration
from vitreg_hub.errors import HubError, HubRefusedError, VitregError
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.hub.publish import Pushed, push

PATIENCE, SLOWEST = 1800, 250_000
"""Seconds allowed for a push, plus one for so many bytes (2 Mbit/s). The first is many times what verifying and the
client's own retries take; whatever takes longer has stalled, which the client would never notice.
"""


LOOK = 0.2
"""Seconds between one look at what would end a push early and the next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotPushed:
    """Why a bundle is not on the Hub.

    Attributes:
        kind: "failed" may succeed another time, "refused" would be refused again.
        why: One sentence.
    """

    kind: Literal["failed", "refused"]
    why: str


Outcome = Pushed | NotPushed
OUTCOME = TypeAdapter(Outcome)


def outcome_of_push(folder: str | Path, repo_id: str, **options: Any) -> Outcome:
    """Call `hub.push` with these arguments and return its errors instead of raising them."""
    try:
        return push(folder, repo_id, **options)
    except VitregError as error:
        temporary = isinstance(error, HubError) and not isinstance(error, HubRefusedError)
        return NotPushed(kind="failed" if temporary else "refused", why=str(error))


def push_apart(
    folder: Path, repo_id: str, *, seconds: float | None = None, stop: Event | None = None, **options: Any
) -> Outcome:
    """Push in a process of its own, on the CPU; one that hangs is killed.

    A bundle is verified before it is sent. In the run's own process, that would use up its random numbers and change
    torch's default type. The new process imports this module only; one of `multiprocessing` would import the user's
    script again, which without a guard would start another training.

    It is given up after so many seconds, by default by the size of the files, and when `stop` is set. Options are those
    of `hub.push`. Ctrl-C does not reach it, so that a run that is interrupted can wait for it.
    """
    seconds = patience(folder) if seconds is None else seconds
    asked = json.dumps({"folder": str(folder), "repo_id": repo_id, **options})
    command = [sys.executable, "-P", "-m", "vitreg_hub.training.run.push_apart"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        process = Popen(command, env=env, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
    except OSError as error:  # no memory for one more process
        return NotPushed(kind="failed", why=f"its process cannot be started: {error.strerror or error}.")
    with process:
        try:
            answer, said = _answer(process, asked, end=time.monotonic() + seconds, stop=stop)
        except TimeoutError:
            if stop is not None and stop.is_set():
                return NotPushed(kind="refused", why="it was interrupted.")
            late = f"it was not done after {duration(seconds)} and was given up"
            return NotPushed(kind="refused", why=f"{late}: the Hub stalls, or the network is too slow.")
        finally:
            process.kill()  # one that has ended stays as it is
    if process.returncode:  # a bug, or it was killed
        last = said.strip().rpartition("\n")[2] or "no reason given"
        return NotPushed(kind="refused", why=f"its process ended with status {process.returncode}: {last}")
    return OUTCOME.validate_json(answer)


def _answer(process: Popen[str], asked: str | None, *, end: float, stop: Event | None) -> tuple[str, str]:
    """What a process writes when it is asked.

    Raises:
        TimeoutError: It has not ended by then, or `stop` is set.
    """
    while True:
        try:
            return process.communicate(asked, timeout=LOOK)
        except TimeoutExpired as error:
            asked = None  # the rest of it is still sent
            if time.monotonic() > end or (stop is not None and stop.is_set()):
                raise TimeoutError from error


def patience(folder: Path) -> float:
    """Seconds after which to give up the push of a bundle and of the text tower beside it."""
    tower = folder.with_name(f"{folder.name}{TOWER_SUFFIX}")
    files = [file for part in (folder, tower) if part.is_dir() for file in part.iterdir()]
    return PATIENCE + sum(file.stat().st_size for file in files) / SLOWEST


def main() -> None:
    """Read a request from standard input and answer on standard output, to which nothing else may write."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answer:
        answer.write(OUTCOME.dump_json(outcome_of_push(**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
