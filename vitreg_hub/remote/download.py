"""Bundles and checkpoints of the Hub in huggingface_hub's cache: complete and undamaged, or one sentence why not."""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile

from vitreg_hub.bounded import read_json, read_small
from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.files import (
    BUNDLE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    EXTRA_FILES,
    GIT,
    OPENCLIP_CONFIG,
    SHA256,
    WEIGHTS_FILE,
    checksum,
    require_space,
)
from vitreg_hub.names import HUB_PREFIX, parse_repo
from vitreg_hub.remote.client import hub_errors, is_transient, no_hub, patiently, reach

logger = logging.getLogger(__name__)

CONVERTED_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model")
"""transformers' types of the models that `vitreg convert` reads."""
CONVERTED_ARCHS = ("vit_", "deit_", "deit3_")
"""Beginnings of timm's names of the networks that `vitreg convert` reads."""
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".pyth", ".bin")
DATA = (".parquet", ".arrow", ".csv", ".jsonl", ".tar", ".zip")


def download(name: str) -> Path:
    """Fetch a bundle's files into the cache and return their folder; where the Hub does not answer, the cached copy.

    The small config.json comes first, so that nothing large is fetched from a repository without a bundle. Every file
    is checked against the Hub's checksum; a damaged one is fetched again, once.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.

    Raises:
        BundleError: The repository holds something else; the message says what, and how to convert it.
        HubError: No such repository or revision, no permission, no network, no room, or lasting damage.
    """
    repo_id, commit = parse_repo(name)[0], download_config(name).name
    return _snapshot(repo_id, commit, [*BUNDLE_FILES, *EXTRA_FILES], required=[CONFIG_FILE, WEIGHTS_FILE])


def download_config(name: str) -> Path:
    """Fetch only a bundle's config.json, otherwise like `download`; the name of the folder is the commit."""
    repo_id, revision = parse_repo(name)
    folder = _snapshot(repo_id, revision, [CONFIG_FILE, OPENCLIP_CONFIG], required=[CONFIG_FILE])
    _require_bundle(name, folder, _names(repo_id, folder))
    return folder


def download_checkpoint(
    name: str, choose: Callable[[Sequence[str]], str], weight_map: Callable[[Path], Mapping[str, str]]
) -> tuple[Path, list[str]]:
    """Fetch one checkpoint of any repository, with its configurations and card, like `download`.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.
        choose: Picks the weights file, or the index of its shards, from the names of the repository's files.

    Returns:
        The folder, and the names of the chosen file and of its shards.

    Raises:
        HubError: As for `download`.
    """
    repo_id, revision = parse_repo(name)
    folder = _snapshot(repo_id, revision, ["*.json", CARD_FILE])
    chosen = [choose(_names(repo_id, folder))]
    if chosen[0].endswith(".index.json"):
        chosen += sorted(set(weight_map(folder / chosen[0]).values()))
    return _snapshot(repo_id, folder.name, [glob.escape(name) for name in chosen], required=chosen), chosen


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str], *, required: Sequence[str] = ()) -> Path:
    """Have all files of a commit that fit the patterns in the cache, undamaged.

    Other libraries leave a cache without a listing of the commit: then only the required files are checked.
    """
    with hub_errors(repo_id):
        fetch = partial(hf.snapshot_download, repo_id, allow_patterns=list(patterns))
        commit, answered = _commit(repo_id, revision)
        _require_space(repo_id, commit, patterns)
        # Given the name of a branch, the client also keeps its commit, for times without the Hub.
        folder = Path(patiently(partial(fetch, revision=revision if answered else commit)))
        if folder.name != commit:  # meanwhile the Hub failed, or the branch moved
            folder = Path(patiently(partial(fetch, revision=commit)))
        listing = _listing(repo_id, commit)
        names = required if listing is None else [name for name in listing if _fits(name, patterns)]
        for name in names:  # where the Hub fails, the client returns what is cached, even if incomplete
            fetch_file(repo_id, name, commit, listed=listing[name] if listing else None, cached=folder / name)
    return folder


def _commit(repo_id: str, revision: str | None) -> tuple[str, bool]:
    """The commit of a branch or tag, and whether it is from the Hub, or from the cache if the Hub does not answer."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision, True
    api = hf.HfApi(library_name="vitreg_hub")
    try:
        reach()
        commit = patiently(partial(api.model_info, repo_id, revision=revision)).sha
        if commit is None:
            raise HubError(no_hub())
        return commit, True
    except (httpx.TransportError, hf_errors.HfHubHTTPError, hf_errors.OfflineModeIsEnabled) as error:
        offline = isinstance(error, hf_errors.OfflineModeIsEnabled)
        if not (offline or is_transient(error)):
            raise
        try:
            commit = api.resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
        except hf_errors.RevisionResolutionError:
            raise hf_errors.LocalEntryNotFoundError(f"{repo_id} is not in the cache") from error
        if not offline:  # whoever sets HF_HUB_OFFLINE knows it
            logger.warning("%s: the Hub does not answer, so this is the cached commit %s.", repo_id, commit)
        return commit, False


def fetch_file(
    repo_id: str,
    name: str,
    commit: str,
    *,
    expected: str | None = None,
    listed: RepoFile | None = None,
    cached: Path | None = None,
) -> Path:
    """Have one undamaged file of a commit in the cache; a damaged one is fetched again, once.

    Args:
        expected: Its checksum; by default the one by which the cache names it, if the cache has links.
        listed: Its entry in the cached listing, for a cache without links.

    Raises:
        HubError: The Hub cannot be reached, or sends a damaged file as well, which is then deleted.
    """
    fetch = partial(hf.hf_hub_download, repo_id, name, revision=commit)
    file = cached if cached is not None and cached.exists() else Path(patiently(fetch))
    if not _is_damaged(file, expected, listed):
        return file
    if not file.is_symlink():  # the client would leave it as it is
        file.unlink(missing_ok=True)
    try:
        file = Path(patiently(partial(fetch, force_download=True)))
    except ValueError as error:  # the client's way to say that the Hub cannot be reached
        raise HubError(
            f"{name} of {repo_id} is damaged in the cache, and {hf.constants.ENDPOINT} cannot be reached to fetch it "
            "again: check the network or HF_HUB_OFFLINE."
        ) from error
    if _is_damaged(file, expected, listed):
        for path in {file.resolve(), file}:  # other programs would not notice
            path.unlink(missing_ok=True)
        raise HubError(f"{name} of {repo_id} was fetched twice, and twice its checksum was wrong: try again later.")
    return file


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _listing(repo_id: str, commit: str) -> dict[str, RepoFile] | None:
    """Every file of a commit by name; None if the cache has no listing of it."""
    try:
        return {file.path: file for file in hf.get_cached_repo_tree(repo_id, revision=commit)}
    except hf_errors.CachedRepoTreeNotFoundError:
        return None


def _names(repo_id: str, folder: Path) -> list[str]:
    """The files of a commit, or those that are cached."""
    return list(_listing(repo_id, folder.name) or (path.name for path in folder.iterdir()))


def _require_space(repo_id: str, commit: str, patterns: Sequence[str]) -> None:
    cache = Path(hf.constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    listing = _listing(repo_id, commit) or {}
    missing = [file.size for name, file in listing.items() if _fits(name, patterns) and not (folder / name).exists()]
    require_space(cache, sum(missing), what=repo_id)


def _is_damaged(file: Path, expected: str | None, listed: RepoFile | None) -> bool:
    """Whether a cached file has another checksum than on the Hub."""
    if expected is None and file.is_symlink():
        expected = os.path.basename(os.readlink(file))
    if expected is not None:
        return len(expected) in (40, 64) and checksum(file, like=expected) != expected
    return listed is not None and listed.blob_id not in _blob_ids(file)


def _blob_ids(file: Path) -> Iterator[str]:
    """Git's ids of a file: of the pointer that it keeps for a large one (LFS), and of the content."""
    sha256, size = checksum(file, like=SHA256), file.stat().st_size
    yield checksum(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode(), like=GIT)
    yield checksum(file, like=GIT)


def _require_bundle(name: str, folder: Path, names: Sequence[str]) -> None:
    """Refuse a repository without a bundle before anything large is fetched."""
    config = _config(folder)
    if isinstance(config.get("vitreg"), dict) and (WEIGHTS_FILE in names or OPENCLIP_CONFIG not in names):
        return
    what, converted = _describe(config, names)
    repo = f"{HUB_PREFIX}{name.removeprefix(HUB_PREFIX)}"
    remedy = f": make it one with `vitreg convert {repo} FOLDER`" if converted else ""
    raise BundleError(f"{repo} is not a bundle but {what}{remedy}.")


def _config(folder: Path) -> dict[str, Any]:
    """The content of config.json; empty if there is none, or it is not a JSON object."""
    try:
        config = read_json(read_small(folder / CONFIG_FILE))
    except (OSError, ValueError):  # also a BundleError
        return {}
    return config if isinstance(config, dict) else {}


def _describe(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, bool]:
    """What a repository without a bundle holds, and whether `vitreg convert` may read it."""
    weights = [name for name in names if name.endswith(CHECKPOINTS) and "/" not in name]
    if OPENCLIP_CONFIG in names:
        return "an OpenCLIP model with both towers", bool(weights)
    arch, kind = config.get("architecture"), config.get("model_type")
    if isinstance(arch, str):
        return f"a timm model ({arch})", arch.startswith(CONVERTED_ARCHS)
    if isinstance(kind, str):
        return f"a transformers model of type {kind}", kind in CONVERTED_TYPES
    if weights:
        plural = "s" if len(weights) > 1 else ""
        return f"a repository with the checkpoint{plural} {', '.join(sorted(weights)[:3])}", True
    if any(name.endswith(DATA) for name in names):
        return "a repository of data without a model", False
    return "a repository without a model", False
