"""Publishing bundles while a run goes on. A failing Hub does not stop the run."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Self

import huggingface_hub as hf

from vitreg_hub.errors import HubError, HubRefusedError
from vitreg_hub.files import TOWER_SUFFIX
from vitreg_hub.hub.publish import Pushed, push_command, require_token
from vitreg_hub.hub.target import Target, look
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.training.run.folders import BEST, MODEL
from vitreg_hub.training.run.push_apart import Outcome, push_apart

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8, 16, 32)
"""Seconds between one try and the next."""
ASKING = 60
"""Seconds that the Hub has at the start of a run to say whether it takes the models, many times what it needs."""

MAIN = "main"
"""Branch of the last weights."""

Push = Callable[..., Outcome]
"""Sends a folder as `push_apart` does, with the same arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Upload:
    copy: Path
    outdated: Event
    future: Future[None]


class Publisher:
    """Publishes bundles one after the other, in the background. Only the main process makes one.

    An upload that waits for its turn or for its next try is dropped when a newer one is submitted for the same branch.
    An upload is tried again when the Hub fails, but not when the Hub refuses it or when it fails for another reason.
    The run is never stopped; `errors` says what went wrong.

    Args:
        private: Whether a new repository can be seen by its owner alone.
        license: The weights' license as the user gives it.
        waits: Seconds before the second try of an upload, the third, and so on; after the last one it is given up.
        pause: Waits for an event, at most so many seconds, and returns whether it happened.

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
        push: Push | None = None,
        pause: Callable[[Event, float], bool] = Event.wait,
    ) -> None:
        require_token(repo_id)
        self.repo_id = repo_id
        self._options = {"private": private, "license": license}
        self._stop = Event()
        self._push = push or partial(push_apart, stop=self._stop)
        self._waits, self._pause = tuple(waits), pause
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._newest: dict[str, _Upload] = {}
        self._futures: list[Future[None]] = []
        self.commits: dict[str, str] = {}
        """Address of the last commit on each branch, even if a newer upload has failed since."""
        self.errors: dict[str, str] = {}
        """Why the newest bundle of a branch could not be published; only branches where that is so."""

    def ask(self, *, towers: bool = False, seconds: float = ASKING) -> None:
        """Find out now whether anything would keep the models, and text towers, from being published at the end.

        A Hub that does not answer in so many seconds is no reason to stop: it may be back by then.

        Raises:
            HubRefusedError: The token is invalid or may only read, or a repository cannot become what was asked for.
        """
        repos = [self.repo_id, f"{self.repo_id}{TOWER_SUFFIX}"] if towers else [self.repo_id]
        try:
            _within(seconds, partial(_ask, repos, private=self._options["private"]))
        except HubRefusedError:
            raise
        except HubError as error:
            logger.warning("cannot find out whether %s takes the models, the run goes on: %s", self.repo_id, error)

    def submit(self, folder: str | Path, *, branch: str = MAIN) -> Future[None] | None:
        """Publish a bundle as soon as possible, together with the text tower beside it, if there is one.

        The folder may be deleted right away, but its files must not be changed.

        Returns:
            Done when the upload has ended, well or not; None if the folder could not be copied.
        """
        older = self._newest.pop(branch, None)
        if older is not None:
            older.outdated.set()
            if older.future.cancel():
                shutil.rmtree(older.copy, ignore_errors=True)
        try:
            copy = _copy(Path(folder))
        except OSError as error:
            self._failed(branch, f"{folder} cannot be copied: {error.strerror or error}.")
            return None
        outdated = Event()
        future = self._thread.submit(self._upload, copy, Path(folder).name, branch, outdated)
        self._futures.append(future)
        self._newest[branch] = _Upload(copy=copy, outdated=outdated, future=future)
        return future

    def close(self) -> dict[str, str]:
        """Wait for the last uploads; returns the address of the commit on each branch whose newest bundle arrived.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile, which ends all uploads.
        """
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:
            for event in (*(upload.outdated for upload in self._newest.values()), self._stop):
                event.set()
            self._thread.shutdown(wait=False, cancel_futures=True)
            raise
        for future in self._futures:
            if not future.cancelled():
                future.result()  # raises what only a bug can have raised
        return {branch: commit for branch, commit in self.commits.items() if branch not in self.errors}

    def publish_last(self, run: Path) -> dict[str, str]:
        """Publish the last and the best model of a finished run, and wait and return as `close` does.

        Raises:
            HubError: The last model could not be published.
        """
        folders = {MAIN: run / MODEL, BEST: run / BEST}
        for branch, folder in folders.items():
            if folder.is_dir():
                self.submit(folder, branch=branch)
        commits, errors = self.close(), self.errors
        by_hand = {
            branch: push_command(folders[branch], self.repo_id, branch=branch, **self._options) for branch in errors
        }
        if BEST in errors:
            logger.error("%s is not on the Hub (%s): %s", folders[BEST], errors[BEST].rstrip("."), by_hand[BEST])
        if MAIN in errors:
            words = {MAIN: "an older checkpoint", BEST: "the best model" if BEST in commits else "an older best model"}
            there = [f"{words[branch]} on {branch} ({commit})" for branch, commit in self.commits.items()]
            what, only = "nothing could be published", ""
            if there:
                what, only = f"{folders[MAIN]} could not be published", f", only {' and '.join(there)}"
            raise HubError(
                f"{what} ({errors[MAIN].rstrip('.')}){only}: {run} is complete, send it with `{by_hand[MAIN]}`."
            )
        return commits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _upload(self, copy: Path, name: str, branch: str, outdated: Event) -> None:
        """Runs in the thread."""
        try:
            for tries, wait in enumerate((*self._waits, None), start=1):
                outcome = self._push(copy / name, self.repo_id, branch=branch, **self._options)
                if isinstance(outcome, Pushed):
                    self.commits[branch] = outcome.url
                    if not outdated.is_set():
                        self.errors.pop(branch, None)
                    logger.info("published %s", outcome.url)
                    return
                if wait is None or outcome.kind == "refused":
                    if not outdated.is_set():
                        self._failed(branch, outcome.why)
                    return
                if tries == 1:
                    where = f"{self.repo_id}@{branch}"
                    logger.warning("publishing to %s failed and is tried again: %s", where, outcome.why)
                if self._pause(outdated, wait):
                    return
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _failed(self, branch: str, why: str) -> None:
        self.errors[branch] = why
        logger.error("publishing to %s@%s failed, the run goes on: %s", self.repo_id, branch, why)


def _ask(repos: Sequence[str], *, private: bool) -> None:
    """Raises what `Publisher.ask` does, or a HubError where the Hub does not answer."""
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
    """Make a request, for which the client itself sets no time limit; raises a HubError without an answer in time."""
    answer: Future[None] = Future()

    def ask() -> None:
        try:
            answer.set_result(request())
        except BaseException as error:  # is raised by `result` below
            answer.set_exception(error)

    Thread(target=ask, name="asking the Hub", daemon=True).start()
    try:
        answer.result(seconds)
    except TimeoutError as error:
        raise HubError(f"there was no answer within {seconds} seconds: check the network.") from error


def _copy(folder: Path) -> Path:
    """Copy a bundle and its text tower into a new folder beside them, without a checkpoint's state."""
    copy = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    tower = folder.with_name(f"{folder.name}{TOWER_SUFFIX}")
    sources = [folder, tower] if tower.is_dir() else [folder]
    try:
        for source in sources:
            (copy / source.name).mkdir()
            for file in source.iterdir():
                if file.is_file():
                    _link(file, copy / source.name / file.name)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
