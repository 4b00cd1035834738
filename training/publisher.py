"""Bundles to the Hub while a run goes on, which a Hub that fails does not stop."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Self

from vitreg_hub.errors import HubError, VitregError
from vitreg_hub.hub import require_token

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds between one try and the next."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells its processes."""

Push = Callable[[Path, str, bool], str]
"""Takes a bundle's folder, a repository and whether a new one is private; gives the commit's address."""


def push_apart(folder: Path, repo_id: str, private: bool) -> str:
    """`hub.push` in a process of its own, on the CPU.

    A bundle is verified before it is sent. In the process of the run, that would draw from its random numbers and
    change torch's default type under its hands.

    Raises:
        HubError: It failed, with the sentence that says why.
    """
    command = [sys.executable, "-P", "-m", "vitreg_hub", "push", str(folder), repo_id]
    command += ["--private"] if private else []
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no reason given"]
    if done.returncode:
        raise HubError(said[-1].removeprefix("vitreg: "))
    return said[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upload:
    copy: Path
    outdated: Event
    future: Future[None]


class Publisher:
    """Publishes bundles one after the other, in the background. Only the main process makes one.

    What waits while another is being sent is dropped when something newer comes, and so is what has failed and waits
    for its next try. The run is never stopped; `pushed` and `error` say how it went.

    Args:
        repo_id: ``org/name``.
        private: Whether a new repository can be seen by its owner alone.
        waits: Seconds before the second try of an upload, the third, and so on; after the last one it is given up.
        push: Sends a folder.

    Raises:
        HubError: No token, or no repository id.
    """

    def __init__(
        self, repo_id: str, *, private: bool = False, waits: Sequence[float] = WAITS, push: Push = push_apart
    ) -> None:
        require_token(repo_id)
        self._repo_id, self._private, self._waits, self._push = repo_id, private, tuple(waits), push
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._uploads: list[_Upload] = []
        self._commits: list[str] = []
        self.error: str | None = None
        """Why the last upload failed; None if it did not."""

    @property
    def pushed(self) -> bool:
        """Whether anything is on the Hub by now."""
        return bool(self._commits)

    def submit(self, folder: str | Path) -> None:
        """Publish a bundle as soon as may be. Its folder may be deleted at once, but its files must not be changed."""
        try:
            copy = _copy(Path(folder))
        except OSError as error:
            self._failed(f"{folder} cannot be copied: {error.strerror or error}.")
            return
        for upload in self._uploads:
            upload.outdated.set()
            if upload.future.cancel():
                shutil.rmtree(upload.copy, ignore_errors=True)
        outdated = Event()
        self._uploads = [upload for upload in self._uploads if not upload.future.cancelled()]
        self._uploads.append(
            _Upload(copy=copy, outdated=outdated, future=self._thread.submit(self._upload, copy, outdated))
        )

    def close(self) -> tuple[str, ...]:
        """Wait for the last upload.

        Returns:
            Addresses of all commits of the run.
        """
        self._thread.shutdown()
        for upload in self._uploads:
            upload.future.result()
        return tuple(self._commits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _upload(self, copy: Path, outdated: Event) -> None:
        """What runs in the thread."""
        try:
            for tries, wait in enumerate((*self._waits, None), start=1):
                try:
                    commit = self._push(copy, self._repo_id, self._private)
                except (VitregError, OSError) as error:
                    if wait is None:
                        self._failed(str(error))
                        return
                    if tries == 1:
                        logger.warning("publishing to %s failed and is tried again: %s", self._repo_id, error)
                    if outdated.wait(wait):
                        return
                else:
                    self._commits.append(commit)
                    self.error = None
                    logger.info("published %s", commit)
                    return
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _failed(self, why: str) -> None:
        self.error = why
        logger.error("publishing to %s failed, the run goes on: %s", self._repo_id, why)


def _copy(folder: Path) -> Path:
    """A folder beside another, with the same files."""
    copy = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(folder, copy, copy_function=_link, dirs_exist_ok=True)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _link(source: str, target: str) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
