"""Bundles to the Hub while a run goes on, which a Hub that fails does not stop."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Self

import huggingface_hub as hf

from vitreg_hub.console import HUB_FAILED
from vitreg_hub.environment import duration
from vitreg_hub.errors import HubError, HubRefusedError, VitregError
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.hub.publish import require_token
from vitreg_hub.hub.target import Target, look
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.training.run.folders import BEST

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds between one try and the next."""
PATIENCE, SLOWEST = 1800, 250_000
"""Seconds for a push, and bytes a second that come on top of it. The first is many times what opening the doors and the
client's own tries take, the second a line of 2 Mbit/s: what takes longer stalls, which the client would never notice.
"""
ASKING = 60
"""Seconds that the Hub has at a run's start to say whether it takes the models: many times what all tries need."""

MAIN = "main"
"""Branch of the last weights."""

Push = Callable[..., str]
"""Sends a folder as `push_apart` does, with the same arguments."""


def push_apart(folder: Path, repo_id: str, *, branch: str, private: bool, license: str | None) -> str:
    """`hub.push` in a process of its own, on the CPU.

    A bundle is verified before it is sent. In the process of the run, that would draw from its random numbers and
    change torch's default type under its hands.

    Args:
        folder: Of the bundle.
        repo_id: ``org/name``.
        branch: Where the commit goes.
        private: Whether a new repository can be seen by its owner alone.
        license: What the user says of it.

    Returns:
        Address of the commit.

    Raises:
        HubError: The Hub failed, with the sentence that says how.
        VitregError: The same of anything else, which the next try would not change; or it took so long that the run is
            not to wait for another one.
    """
    arguments = _push_arguments(folder, repo_id, branch=branch, private=private, license=license)
    command = [sys.executable, "-P", "-m", "vitreg_hub", *arguments]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    patience = _patience(folder)
    try:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience
        )
    except subprocess.TimeoutExpired as error:
        raise VitregError(
            f"it was not done after {duration(patience)} and was given up: the Hub stalls, or the network is too slow."
        ) from error
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no reason given"]
    if done.returncode:
        raise (HubError if done.returncode == HUB_FAILED else VitregError)(said[-1].removeprefix("vitreg: "))
    return said[-1]


def _patience(folder: Path) -> float:
    """Seconds after which the push of a bundle, and of the text tower beside it, is given up."""
    tower = folder.with_name(f"{folder.name}{TOWER_SUFFIX}")
    files = [file for part in (folder, *[tower] * tower.is_dir()) for file in part.iterdir()]
    return PATIENCE + sum(file.stat().st_size for file in files) / SLOWEST


def _push_arguments(
    folder: str | Path, repo_id: str, *, branch: str, private: bool, license: str | None
) -> tuple[str, ...]:
    """What comes after ``vitreg``."""
    options = ("--branch", branch, *["--private"] * private, *(["--license", license] if license else []))
    return ("push", str(folder), repo_id, *options)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upload:
    branch: str
    copy: Path
    outdated: Event
    future: Future[None]


class Publisher:
    """Publishes bundles one after the other, in the background. Only the main process makes one.

    What waits while another is being sent is dropped when something newer comes for its branch, and so is what the Hub
    has failed with and waits for its next try. What the Hub refuses, or what fails for another reason, is tried once.
    The run is never stopped; `errors` says what went wrong.

    Args:
        repo_id: ``org/name``.
        private: Whether a new repository can be seen by its owner alone.
        license: What the user says of the weights' license.
        waits: Seconds before the second try of an upload, the third, and so on; after the last one it is given up.
        push: Sends a folder.

    Raises:
        HubError: No token, or no repository id.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        license: str | None = None,
        waits: Sequence[float] = WAITS,
        push: Push = push_apart,
    ) -> None:
        require_token(repo_id)
        self.repo_id = repo_id
        self._options, self._waits, self._push = {"private": private, "license": license}, tuple(waits), push
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._uploads: list[_Upload] = []
        self.commits: dict[str, str] = {}
        """Address of the last commit on each branch that got one, also if something newer failed since."""
        self.errors: dict[str, str] = {}
        """Why the newest bundle of a branch is not there; nothing of branches where it is."""

    def ask(self, *, towers: bool = False) -> None:
        """Find out now what would keep the models from being published at the end, as far as the Hub tells.

        A Hub that cannot tell stops nothing: it may be there again when it is needed.

        Args:
            towers: Whether text towers go along, into a repository of their own.

        Raises:
            HubRefusedError: The token is invalid or may only read, or a repository cannot become what was asked for.
        """
        repos = (self.repo_id, *[f"{self.repo_id}{TOWER_SUFFIX}"] * towers)
        try:
            _within(ASKING, partial(_ask, repos, private=self._options["private"]))
        except HubRefusedError:
            raise
        except HubError as error:
            logger.warning("whether %s takes the models is not known, the run goes on: %s", self.repo_id, error)

    def submit(self, folder: str | Path, *, branch: str = MAIN) -> None:
        """Publish a bundle as soon as may be, with the text tower beside it, if there is one.

        Its folder may be deleted at once, but its files must not be changed.
        """
        for upload in (upload for upload in self._uploads if upload.branch == branch):
            upload.outdated.set()
            if upload.future.cancel():
                shutil.rmtree(upload.copy, ignore_errors=True)
        self._uploads = [upload for upload in self._uploads if not _is_over(upload.future)]
        try:
            copy = _copy(Path(folder))
        except OSError as error:
            self._failed(branch, f"{folder} cannot be copied: {error.strerror or error}.")
            return
        outdated = Event()
        future = self._thread.submit(self._upload, copy, Path(folder).name, branch, outdated)
        self._uploads.append(_Upload(branch=branch, copy=copy, outdated=outdated, future=future))

    def close(self) -> dict[str, str]:
        """Wait for the last uploads.

        Returns:
            Address of the last commit on each branch whose newest bundle it holds.
        """
        self._thread.shutdown()
        for upload in self._uploads:
            upload.future.result()
        return {branch: commit for branch, commit in self.commits.items() if branch not in self.errors}

    def by_hand(self, folder: Path, *, branch: str) -> str:
        """The command that publishes a bundle as this does."""
        return shlex.join(["vitreg", *_push_arguments(folder, self.repo_id, branch=branch, **self._options)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _upload(self, copy: Path, name: str, branch: str, outdated: Event) -> None:
        """What runs in the thread."""
        try:
            for tries, wait in enumerate((*self._waits, None), start=1):
                try:
                    commit = self._push(copy / name, self.repo_id, branch=branch, **self._options)
                except (VitregError, OSError) as error:
                    final = isinstance(error, HubRefusedError) or not isinstance(error, HubError | OSError)
                    if wait is None or final:
                        if not outdated.is_set():
                            self._failed(branch, str(error))
                        return
                    if tries == 1:
                        logger.warning("publishing to %s@%s failed and is tried again: %s", self.repo_id, branch, error)
                    if outdated.wait(wait):
                        return
                else:
                    self.commits[branch] = commit
                    if not outdated.is_set():
                        self.errors.pop(branch, None)
                    logger.info("published %s", commit)
                    return
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _failed(self, branch: str, why: str) -> None:
        self.errors[branch] = why
        logger.error("publishing to %s@%s failed, the run goes on: %s", self.repo_id, branch, why)


def _ask(repos: Sequence[str], *, private: bool) -> None:
    """
    Raises:
        HubRefusedError: As `Publisher.ask`.
        HubError: It cannot be found out.
    """
    api = hf.HfApi(library_name="vitreg_hub")
    with hub_errors(repos[0]):
        token = patiently(api.whoami).get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise HubRefusedError(f"the access token may only read: use one with write permission for {repos[0]}.")
    for repo_id in repos:
        with hub_errors(repo_id):
            for branch in (MAIN, BEST):
                look(api, repo_id, Target(branch=branch, private=private))


def _within(seconds: float, request: Callable[[], None]) -> None:
    """Make a request in a thread that nobody waits for longer than that, for the Hub's client has no such limit.

    Raises:
        HubError: There is no answer.
    """
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:  # goes to whoever waits
            answer.set_exception(error)

    Thread(target=ask, name="asking the Hub", daemon=True).start()
    try:
        answer.result(seconds)
    except TimeoutError as error:
        raise HubError(f"there was no answer within {seconds} seconds: check the network.") from error


def _is_over(future: Future[None]) -> bool:
    """Whether there is nothing more to wait for or to be told, such as a bug."""
    return future.cancelled() or (future.done() and future.exception() is None)


def _copy(folder: Path) -> Path:
    """A folder beside a bundle's, with copies of that and of its text tower's; a checkpoint's state stays behind."""
    copy = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    tower = folder.with_name(f"{folder.name}{TOWER_SUFFIX}")
    try:
        for source in (folder, *[tower] * tower.is_dir()):
            (copy / source.name).mkdir()
            for file in source.iterdir():
                if file.is_file():
                    _link(file, copy / source.name / file.name)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or where the file system has none, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
