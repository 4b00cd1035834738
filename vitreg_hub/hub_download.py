"""Bundles and checkpoints of the Hub in huggingface_hub's cache: whole and undamaged, or one sentence that says why."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub as hf
from huggingface_hub import errors as hf_errors
from huggingface_hub.file_download import repo_folder_name

from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.hub_access import (
    BUNDLE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    EXTRA_FILES,
    HUB_PREFIX,
    OPENCLIP_CONFIG,
    WEIGHTS_FILE,
    checksum,
    hub_errors,
    parse_repo,
    patiently,
)

CONVERTED_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model")
"""What transformers calls the models that `vitreg convert` reads."""
CONVERTED_ARCHS = ("vit_", "deit_", "deit3_")
"""How timm's names of the networks begin that `vitreg convert` reads."""
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".ckpt", ".pyth", ".bin")
DATA = (".parquet", ".arrow", ".csv", ".jsonl", ".tar", ".zip")


def download(name: str) -> Path:
    """Fetch a bundle's files into the cache and return their folder; offline, the cached copy.

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
    """Fetch one checkpoint of any repository, with configurations and card beside it; offline, the cached copy.

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
    return _snapshot(repo_id, folder.name, chosen, required=chosen), chosen


def require_space(folder: Path, num_bytes: int, *, what: str) -> None:
    """Refuse to write what does not fit on a disk.

    Args:
        folder: Where, or a folder that will hold it.
        num_bytes: How much.
        what: For the message.

    Raises:
        HubError: There is not enough room.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < num_bytes:
        raise HubError(
            f"{what} takes {num_bytes / 1e6:,.1f} MB, but at {existing} only {free / 1e6:,.1f} MB are free: make room."
        )


def _snapshot(repo_id: str, revision: str | None, patterns: Sequence[str], *, required: Sequence[str] = ()) -> Path:
    """Have those files of a commit in the cache that fit the patterns, all of them and with the right checksums.

    Args:
        repo_id: ``org/name``.
        revision: Branch, tag or commit; the main branch by default.
        patterns: Shell-style.
        required: Files that the commit must have, for a cache without a listing of it, as other libraries leave one.
    """
    with hub_errors(repo_id):
        fetch = partial(hf.snapshot_download, repo_id, revision=revision, allow_patterns=list(patterns))
        if revision is not None:
            _require_space(repo_id, revision, patterns)
        folder = Path(patiently(fetch))
        sizes = _sizes(repo_id, folder.name)
        names = required if sizes is None else [name for name in sizes if _fits(name, patterns)]
        for name in names:  # where the Hub fails, the client gives what is cached, be it a part
            fetch_file(repo_id, name, folder.name, cached=folder / name)
    return folder


def fetch_file(repo_id: str, name: str, commit: str, *, told: str | None = None, cached: Path | None = None) -> Path:
    """Have one file of a commit in the cache, whole; a damaged one is fetched again, once.

    Args:
        repo_id: ``org/name``.
        name: Of the file.
        commit: Its id.
        told: Its checksum; by default the one that the cache calls it by, where it can make links.
        cached: Where it is, if it is in the cache.

    Raises:
        HubError: The Hub cannot be reached, or what comes is damaged as well; it is not left in the cache.
    """
    fetch = partial(hf.hf_hub_download, repo_id, name, revision=commit)
    file = cached if cached is not None and cached.exists() else Path(patiently(fetch))
    if not _is_damaged(file, told):
        return file
    try:
        file = Path(patiently(partial(fetch, force_download=True)))
    except ValueError as error:  # how the client says that the Hub cannot be reached
        raise HubError(
            f"{name} of {repo_id} is damaged in the cache, and {hf.constants.ENDPOINT} cannot be reached to fetch it "
            "again: check the network or HF_HUB_OFFLINE."
        ) from error
    if _is_damaged(file, told):
        for path in {file.resolve(), file}:  # other programs would take it for whole
            path.unlink()
        raise HubError(f"{name} of {repo_id} has not the checksum that the Hub told, fetched twice: try again later.")
    return file


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _sizes(repo_id: str, commit: str) -> dict[str, int] | None:
    """Size of every file of a commit by name; None where no listing of it is in the cache."""
    try:
        return {file.path: file.size for file in hf.get_cached_repo_tree(repo_id, revision=commit)}
    except hf_errors.CachedRepoTreeNotFoundError:
        return None


def _names(repo_id: str, folder: Path) -> list[str]:
    """Files of a commit, or those of its files that are cached."""
    return list(_sizes(repo_id, folder.name) or (path.name for path in folder.iterdir()))


def _require_space(repo_id: str, commit: str, patterns: Sequence[str]) -> None:
    cache = Path(hf.constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit
    sizes = _sizes(repo_id, commit) or {}
    lacking = [size for name, size in sizes.items() if _fits(name, patterns) and not (folder / name).exists()]
    require_space(cache, sum(lacking), what=repo_id)


def _is_damaged(file: Path, told: str | None) -> bool:
    """Whether a cached file is not what the Hub told."""
    if told is None:
        told = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
    return len(told) in (40, 64) and checksum(file, like=told) != told


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
