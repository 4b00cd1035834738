"""`hub.push` in a process of its own: what is asked goes in as JSON, what came of it comes out as JSON."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from vitreg_hub.environment import duration
from vitreg_hub.errors import HubError, HubRefusedError, VitregError
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.hub.publish import Pushed, push

PATIENCE, SLOWEST = 1800, 250_000
"""Seconds for a push, and bytes a second that come on top of it. The first is many times what opening the doors and the
client's own tries take, the second a line of 2 Mbit/s: what takes longer stalls, which the client would never notice.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotPushed:
    """Why a bundle is not on the Hub.

    Attributes:
        kind: What "failed" may succeed another time; what was "refused" would be refused again.
        why: One sentence.
    """

    kind: Literal["failed", "refused"]
    why: str


Outcome = Pushed | NotPushed
OUTCOME = TypeAdapter(Outcome)


def outcome_of_push(folder: str | Path, repo_id: str, **options: Any) -> Outcome:
    """What comes of `hub.push`, which takes the same arguments."""
    try:
        return push(folder, repo_id, **options)
    except VitregError as error:
        passes = isinstance(error, HubError) and not isinstance(error, HubRefusedError)
        return NotPushed(kind="failed" if passes else "refused", why=str(error))


def push_apart(folder: Path, repo_id: str, *, seconds: float | None = None, **options: Any) -> Outcome:
    """Push in a process of its own, on the CPU; one that hangs is killed.

    A bundle is verified before it is sent. In the process of the run, that would draw from its random numbers and
    change torch's default type under its hands. The process is one of Python's that imports this module alone: those of
    `multiprocessing` import the user's script once more, which without a guard would train once more.

    Args:
        folder: Of the bundle.
        repo_id: ``org/name``.
        seconds: After which it is given up, as the run is not to wait for another try; by default as the files are
            large.
        **options: As for `hub.push`, as far as JSON can tell them.
    """
    seconds = patience(folder) if seconds is None else seconds
    asked = json.dumps({"folder": str(folder), "repo_id": repo_id, **options})
    command = [sys.executable, "-P", "-m", "vitreg_hub.training.run.push_apart"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, env=env, input=asked, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        why = f"it was not done after {duration(seconds)} and was given up: the Hub stalls, or the network is too slow."
        return NotPushed(kind="refused", why=why)
    except OSError as error:  # no memory for one more process
        return NotPushed(kind="failed", why=f"its process cannot be started: {error.strerror or error}.")
    if done.returncode:  # a bug, or it was killed
        last = done.stderr.strip().rpartition("\n")[2] or "no reason given"
        return NotPushed(kind="refused", why=f"its process ended with status {done.returncode}: {last}")
    return OUTCOME.validate_json(done.stdout)


def patience(folder: Path) -> float:
    """Seconds after which the push of a bundle, and of the text tower beside it, is given up."""
    tower = folder.with_name(f"{folder.name}{TOWER_SUFFIX}")
    files = [file for part in (folder, tower) if part.is_dir() for file in part.iterdir()]
    return PATIENCE + sum(file.stat().st_size for file in files) / SLOWEST


def main() -> None:
    """Do what is asked on the standard input, and answer on the standard output, where nothing else is let write."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answer:
        answer.write(OUTCOME.dump_json(outcome_of_push(**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
