"""Bundles and checkpoints of the Hub in huggingface_hub's cache: whole and undamaged, or one sentence that says why."""

import glob
import json
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

from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.files import (
    BUNDLE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    EXTRA_FILES,
    OPENCLIP_CONFIG,
    WEIGHTS_FILE,
    checksum,
    require_space,
)
from vitreg_hub.names import HUB_PREFIX, parse_repo
from vitreg_hub.remote.client import hub_errors, is_transient, patiently

logger = logging.getLogger(__name__)

CONVERTED_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model")
"""What transformers calls the models that `vitreg convert` reads."""
CONVERTED_ARCHS = ("vit_", "deit_", "deit3_")
"""How timm's names of the networks begin that `vitreg convert` reads."""
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".pyth", ".bin")
GIT, SHA256 = "0" * 40, "0" * 64
"""Of the length of the Hub's two kinds of checksums."""
DATA = (".parquet", ".arrow", ".csv", ".jsonl", ".tar", ".zip")


def download(name: str) -> Path:
    """Fetch a bundle's files into the cache and return their folder; without a Hub to ask, the cached copy.

    The small config.json comes first, so that nothing large is fetched of a repository that holds no bundle. Every
    file has the checksum that the Hub told; a damaged one is fetched again, once.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.

    Raises:
        BundleError: The repository holds something else; the message says what, and how it is converted.
        HubError: No such repository or revision, no permission, no network, no room, or damage that stays.
    """
    repo_id, commit = parse_repo(name)[0], download_config(name).name
    return _snapshot(repo_id, commit, [*BUNDLE_FILES, *EXTRA_FILES], required=[CONFIG_FILE, WEIGHTS_FILE])


def download_config(name: str) -> Path:
    """Fetch a bundle's config.json alone and return its folder, which is named by the commit.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.

    Raises:
        BundleError: As `download`.
        HubError: As `download`.
    """
    repo_id, revision = parse_repo(name)
    folder = _snapshot(repo_id, revision, [CONFIG_FILE, OPENCLIP_CONFIG], required=[CONFIG_FILE])
    _require_bundle(name, folder, _names(repo_id, folder))
    return folder


def download_checkpoint(
    name: str, choose: Callable[[Sequence[str]], str], weight_map: Callable[[Path], Mapping[str, str]]
) -> tuple[Path, list[str]]:
    """Fetch one checkpoint of any repository, with configurations and card beside it, as `download`.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.
        choose: Picks the weights file, or the index of its shards, from the names of the repository's files.
        weight_map: Reads the shard of every tensor from an index.

    Returns:
        The folder, and the names of the chosen file and of its shards.

    Raises:
        HubError: As `download`.
    """
    repo_id, revision = parse_repo(name)
    folder = _snapshot(repo_id, revision, ["*.json", CARD_FILE])
    chosen = [choose(_names(repo_id, folder))]
    if chosen[0].endswith(".index.json"):
        chosen += sorted(set(weight_map(folder / chosen[0]).values()))
    return _snapshot(repo_id, folder.name, [glob.escape(name) for name in chosen], required=chosen), chosen


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str], *, required: Sequence[str] = ()) -> Path:
    """Have those files of a commit in the cache that fit the patterns, all of them and with the right checksums.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit; the main branch by default.
        patterns: Shell-style.
        required: Files that the commit must have, for a cache without a listing of it, as other libraries leave one.
    """
    with hub_errors(repo_id):
        fetch = partial(hf.snapshot_download, repo_id, allow_patterns=list(patterns))
        commit, answered = _commit(repo_id, revision)
        _require_space(repo_id, commit, patterns)
        # By the name of a branch the client keeps its commit, too, for times without the Hub.
        folder = Path(patiently(partial(fetch, revision=revision if answered else commit)))
        if folder.name != commit:  # a moment later the Hub failed or had moved on
            folder = Path(patiently(partial(fetch, revision=commit)))
        listing = _listing(repo_id, commit)
        names = required if listing is None else [name for name in listing if _fits(name, patterns)]
        for name in names:  # where the Hub fails, the client gives what is cached, be it a part
            fetch_file(repo_id, name, commit, listed=listing[name] if listing else None, cached=folder / name)
    return folder


def _commit(repo_id: str, revision: str | None) -> tuple[str, bool]:
    """The commit at a branch or tag, and whether the Hub tells it: where it does not answer, the cache does.

    The client takes the cache's word as well where the Hub refuses, and does not say so.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision, True
    api = hf.HfApi(library_name="vitreg_hub")
    try:
        told = patiently(partial(api.model_info, repo_id, revision=revision))
        return told.sha, True  # pyright: ignore[reportReturnType]  # only listings leave it out
    except (httpx.TransportError, hf_errors.HfHubHTTPError, hf_errors.OfflineModeIsEnabled) as error:
        offline = isinstance(error, hf_errors.OfflineModeIsEnabled)
        if not (offline or is_transient(error)):
            raise
        try:
            commit = api.resolve_revision(repo_id, revision=revision, local_files_only=True).resolved
        except hf_errors.RevisionResolutionError:
            raise hf_errors.LocalEntryNotFoundError(f"{repo_id} is not in the cache") from error
        if not offline:  # who sets HF_HUB_OFFLINE knows
            logger.warning("%s: the Hub does not answer, so this is the cached commit %s.", repo_id, commit)
        return commit, False


def fetch_file(
    repo_id: str,
    name: str,
    commit: str,
    *,
    told: str | None = None,
    listed: RepoFile | None = None,
    cached: Path | None = None,
) -> Path:
    """Have one file of a commit in the cache, whole; a damaged one is fetched again, once.

    Args:
        repo_id: ``org/name``.
        name: Of the file.
        commit: Its id.
        told: Its checksum; by default the one that the cache calls it by, where it can make links.
        listed: Its entry in the cached listing, for a cache without links.
        cached: Where it is, if it is in the cache.

    Raises:
        HubError: The Hub cannot be reached, or what comes is damaged as well; it is not left in the cache.
    """
    fetch = partial(hf.hf_hub_download, repo_id, name, revision=commit)
    file = cached if cached is not None and cached.exists() else Path(patiently(fetch))
    if not _is_damaged(file, told, listed):
        return file
    if not file.is_symlink():  # the client would leave it as it is
        file.unlink(missing_ok=True)
    try:
        file = Path(patiently(partial(fetch, force_download=True)))
    except ValueError as error:  # how the client says that the Hub cannot be reached
        raise HubError(
            f"{name} of {repo_id} is damaged in the cache, and {hf.constants.ENDPOINT} cannot be reached to fetch it "
            "again: check the network or HF_HUB_OFFLINE."
        ) from error
    if _is_damaged(file, told, listed):
        for path in {file.resolve(), file}:  # other programs would take it for whole
            path.unlink(missing_ok=True)
        raise HubError(f"{name} of {repo_id} has not the checksum that the Hub told, fetched twice: try again later.")
    return file


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _listing(repo_id: str, commit: str) -> dict[str, RepoFile] | None:
    """Every file of a commit by name; None where no listing of it is in the cache."""
    try:
        return {file.path: file for file in hf.get_cached_repo_tree(repo_id, revision=commit)}
    except hf_errors.CachedRepoTreeNotFoundError:
        return None


def _names(repo_id: str, folder: Path) -> list[str]:
    """Files of a commit, or those of its files that are cached."""
    return list(_listing(repo_id, folder.name) or (path.name for path in folder.iterdir()))


def _require_space(repo_id: str, commit: str, patterns: Sequence[str]) -> None:
    cache = Path(hf.constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    listing = _listing(repo_id, commit) or {}
    lacking = [file.size for name, file in listing.items() if _fits(name, patterns) and not (folder / name).exists()]
    require_space(cache, sum(lacking), what=repo_id)


def _is_damaged(file: Path, told: str | None, listed: RepoFile | None) -> bool:
    """Whether a cached file is not what the Hub told."""
    if told is None and file.is_symlink():
        told = os.path.basename(os.readlink(file))
    if told is not None:
        return len(told) in (40, 64) and checksum(file, like=told) != told
    return listed is not None and listed.blob_id not in _blob_ids(file)


def _blob_ids(file: Path) -> Iterator[str]:
    """What Git calls a file: by the pointer that it keeps of a large one (LFS), and by its content."""
    sha256, size = checksum(file, like=SHA256), file.stat().st_size
    yield checksum(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode(), like=GIT)
    yield checksum(file, like=GIT)


def _require_bundle(name: str, folder: Path, names: Sequence[str]) -> None:
    """Refuse a repository without a bundle, before anything large is fetched of it.

    Raises:
        BundleError: With what it is, and how to make it one.
    """
    config = _config(folder)
    if isinstance(config.get("vitreg"), dict) and (WEIGHTS_FILE in names or OPENCLIP_CONFIG not in names):
        return
    what, converted = _describe(config, names)
    repo = f"{HUB_PREFIX}{name.removeprefix(HUB_PREFIX)}"
    remedy = f": make it one with `vitreg convert {repo} FOLDER`" if converted else ""
    raise BundleError(f"{repo} is no bundle but {what}{remedy}.")


def _config(folder: Path) -> dict[str, Any]:
    """Content of config.json; nothing where there is none, or no JSON object."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _describe(config: Mapping[str, Any], names: Sequence[str]) -> tuple[str, bool]:
    """What a repository without a bundle holds, and whether `vitreg convert` may read it."""
    weights = [name for name in names if name.endswith(CHECKPOINTS) and "/" not in name]
    if OPENCLIP_CONFIG in names:
        return "an OpenCLIP model with both towers", bool(weights)
    if isinstance(arch := config.get("architecture"), str):
        return f"a timm model ({arch})", arch.startswith(CONVERTED_ARCHS)
    if isinstance(kind := config.get("model_type"), str):
        return f"a transformers model of type {kind}", kind in CONVERTED_TYPES
    if weights:
        return f"a repository with the checkpoint{'s' * (len(weights) > 1)} {', '.join(sorted(weights)[:3])}", True
    if any(name.endswith(DATA) for name in names):
        return "a repository of data without a model", False
    return "a repository without a model", False
