"""What a user may type for a model."""

import difflib
from pathlib import Path

import timm

from vitreg_hub.arch import ARCHS
from vitreg_hub.errors import HubRefusedError, UnknownArchError

HUB_PREFIX = "hf-hub:"


def parse_repo(name: str) -> tuple[str, str | None]:
    """Split ``[hf-hub:]org/name[@revision]`` into repository and revision, as timm writes them.

    Raises:
        HubError: Nothing follows the @.
    """
    repo_id, at, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if at and not revision:
        raise HubRefusedError(f"{name} names no revision: put a branch, tag or commit after the @, or leave the @ out.")
    return repo_id, revision or None


def require_known(model: str | Path) -> None:
    """Refuse a name that means nothing, without opening the model.

    Raises:
        UnknownArchError: It is no folder, no repository, no architecture, or has no such tag.
    """
    if not str(model).startswith(HUB_PREFIX) and not Path(model).is_dir():
        _has_weights(str(model))


def _has_weights(name: str) -> bool:
    """Whether a name asks for weights, or has some that ship with this package.

    Raises:
        UnknownArchError: Neither we nor timm have the architecture, or it has no such tag.
    """
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(name, {*timm.list_models(), *ARCHS}, n=3)
        raise UnknownArchError(
            f"there is no folder and no architecture {name!r}; closest: {', '.join(near) or 'none'}. `vitreg list` "
            f"and timm.list_models() print all; a Hub repository needs the prefix '{HUB_PREFIX}'."
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{arch}.*")]
    if tag and tag not in tags:
        raise UnknownArchError(f"{arch} has no weights {tag!r}; it has {', '.join(tags) or 'none'}.")
    return bool(tag) or bool(arch in ARCHS and timm.get_pretrained_cfg(arch).file)
