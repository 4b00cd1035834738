"""Files and folders that appear complete or not at all, and the names of a bundle's files.

They are on the disk before they get their names, so that a loss of power leaves nothing half written either.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import SEEK_END, BytesIO
from pathlib import Path

from safetensors import SafetensorError

from vitreg_hub.errors import BundleError, HubError

BUNDLE_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE) = ("config.json", "model.safetensors", "README.md")
EXTRA_FILES = (ARTIFACTS_FIGURE, CURVES_FIGURE, RECIPE_FILE, METRICS_FILE) = (
    "artifacts.png",
    "curves.png",
    "recipe.yaml",
    "metrics.jsonl",
)
"""What may lie beside a bundle and is published with it: figures for its card, and the record of a training run."""
PREPROCESSOR_FILE = "preprocessor_config.json"
OPENCLIP_CONFIG, OPENCLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOWER_SUFFIX = "-open_clip"
"""Ends the name of the folder, or repository, with both towers of a CLIP model, beside that of its bundle."""

GIT, SHA256 = "0" * 40, "0" * 64
"""Examples of the Hub's two kinds of checksums, for `checksum`."""
MAX_HEADER = 16 * 2**20
"""Bytes of the header of a .safetensors file; that of a ViT has some 50 kB."""
LARGE_HEADER = f"has a header of more than {MAX_HEADER} bytes, more than any ViT needs"

SWAP, NEW, OLD = "-swap", "new", "old"
"""What `replaced_folder` calls its folders."""


def require_name(path: Path) -> None:
    """Refuse a name that no file can have, or that cannot be written down as text.

    Raises:
        BundleError: It is not UTF-8, or holds a zero byte.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise BundleError(f"{str(path)!r} is not UTF-8: choose another name.") from error
    if "\0" in str(path):
        raise BundleError(f"{str(path)!r} holds a zero byte: choose another name.")


def has_large_header(path: Path) -> bool:
    """Whether reading the header of a .safetensors file would take long."""
    with path.open("rb") as file:
        return MAX_HEADER < int.from_bytes(file.read(8), "little") < path.stat().st_size


def require_absent(target: Path) -> None:
    """Refuse to replace a file or folder.

    Raises:
        BundleError: It exists, or the file system does not let us look.
    """
    require_name(target)
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror}.") from error
    raise BundleError(f"{target} exists: choose another folder or delete it first.")


def synced(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk.

    Raises:
        OSError: The disk failed.
    """
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system does so for folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Have a folder for the length of the block; what had to be made of it and its parents stays if anything is in it.

    Raises:
        OSError: It cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            synced(path.parent)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is used
                path.rmdir()


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `target`, which gets that name at the end of the block.

    Raises:
        BundleError: `target` exists, or cannot be written; nothing is left of it.
    """
    require_absent(target)
    with ExitStack() as stack:
        try:
            stack.enter_context(made(target.parent))
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise BundleError(f"cannot write to {target.parent}: {error.strerror}.") from error
        try:
            yield staging
            mask = _umask()
            for path in (*staging.rglob("*"), staging):  # mkdtemp and safetensors make them private
                path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
                synced(path)
            staging.rename(target)
            synced(target.parent)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError):  # a full disk raises either
                raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error
            raise


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `target`, if there is one, at the end of the block.

    No portable call exchanges two folders. A process that is killed between the two renames leaves both folders
    complete, and the old one can be put back.

    Raises:
        BundleError: It cannot be written; the old one stays.
    """
    swap = target.with_name(f".{target.name}{SWAP}")
    try:
        if swap.exists():
            shutil.rmtree(swap)
        with new_folder(swap / NEW) as staging:
            yield staging
        if target.exists():
            target.rename(swap / OLD)
        (swap / NEW).rename(target)
        synced(target.parent)
        shutil.rmtree(swap)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror or error}.") from error


@contextmanager
def whole_file(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield the path of a file in a hidden folder beside `target`, which it becomes at the end of the block.

    Args:
        target: The file; must not exist unless `replace`.

    Raises:
        BundleError: `target` exists, or cannot be written; it stays as it was.
    """
    if not replace:
        require_absent(target)
    try:
        with (
            made(target.parent),
            tempfile.TemporaryDirectory(
                prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
            ) as new,
        ):
            yield Path(new, target.name)
            synced(Path(new, target.name))
            Path(new, target.name).replace(target)
            synced(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error


def checksum(content: Path | bytes, *, like: str) -> str:
    """The checksum of a file, of the kind that the Hub keeps of it.

    Args:
        like: A checksum of that kind, in hexadecimal: sha256 for a large file (LFS), Git's sha1 for any other.
    """
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        if len(like) == 40:
            size = file.seek(0, SEEK_END)
            file.seek(0)
            return hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: Path, num_bytes: int, *, what: str) -> None:
    """Refuse to write `num_bytes` of `what` into a folder, which need not exist yet, if its disk is too full.

    Raises:
        HubError: There is not enough room.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise HubError(
            f"{what} takes {num_bytes / 1e6:,.1f} MB, but at {existing} only {free / 1e6:,.1f} MB are free: make room."
        )


def read_content(file: Path) -> bytes | None:
    """The content of a file; None if there is none.

    Raises:
        BundleError: It cannot be read.
    """
    try:
        return file.read_bytes() if file.exists() else None
    except OSError as error:
        raise BundleError(f"cannot read {file}: {error.strerror or error}.") from error


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, in place of old ones: all or none.

    Raises:
        BundleError: It cannot be written to.
    """
    before = {name: read_content(folder / name) for name in files}
    done = []
    try:
        with tempfile.TemporaryDirectory(prefix=".vitreg-", dir=folder) as staging:
            for name, content in files.items():
                Path(staging, name).write_bytes(content)
                synced(Path(staging, name))
            for name in files:
                Path(staging, name).replace(folder / name)
                done.append(name)
            synced(folder)
    except OSError as error:
        for name in done:
            if before[name] is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(before[name])
        raise BundleError(f"cannot write to {folder}: {error.strerror or error}.") from error


def find_tower(folder: Path) -> Path | None:
    """The folder of both towers beside a bundle's, if there is one."""
    folder = folder.absolute()
    both = folder.parent / f"{folder.name}{TOWER_SUFFIX}"
    return both if (both / OPENCLIP_CONFIG).is_file() else None
