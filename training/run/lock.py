"""One run at a time in a folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from vitreg_hub.errors import BundleError, RecipeError, VitregError
from vitreg_hub.files import made
from vitreg_hub.training.run.folders import LOCK, clear_leftovers


@contextmanager
def locked(run: Path, *, main: bool) -> Iterator[None]:
    """Keep a folder, which need not exist, for one run, and clear what a killed process left in it.

    All processes of a run enter together, and only the main one locks. The system ends the lock of a killed process.

    Raises:
        RecipeError: Another run has the folder.
        BundleError: It cannot be written to.
    """
    with ExitStack() as stack:
        refusal = None
        if main:
            try:
                stack.enter_context(_alone(run))
                clear_leftovers(run)
            except VitregError as error:
                refusal = error
        for found in gather_object([refusal]):
            if found is not None:
                raise found
        yield


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    with ExitStack() as stack:
        lock = FileLock(run / LOCK, blocking=False, thread_local=False)
        try:
            stack.enter_context(made(run))
            (run / LOCK).touch()
            before = _inode(run / LOCK)
            stack.enter_context(lock)
            if before != _inode(run / LOCK):  # its run deleted it between: what we locked may no longer be there
                raise Timeout(str(run / LOCK))
        except Timeout as error:
            raise RecipeError(f"another run is using {run}: wait for its end, or give another folder.") from error
        except (OSError, RuntimeError) as error:  # the latter if this process has locked it
            raise BundleError(f"cannot write to {run}: {getattr(error, 'strerror', None) or error}.") from error
        try:
            yield
        finally:
            (run / LOCK).unlink(missing_ok=True)


def _inode(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None
