"""What a user may type for a model: parsed here for every command, and refused in the same words."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vitreg_hub.arch import ARCHS
from vitreg_hub.errors import HubRefusedError, UnknownArchError, readable
from vitreg_hub.tags import SHIPPED_WEIGHTS, tags

HUB_PREFIX = "hf-hub:"


def parse_repo(name: str) -> tuple[str, str | None]:
    """Split ``[hf-hub:]org/name[@revision]`` into repository and revision, as timm writes them.

    Raises:
        HubRefusedError: Nothing follows the @.
    """
    repo_id, at, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if at and not revision:
        raise HubRefusedError(f"{name} has nothing after the @: add a branch, tag or commit, or leave the @ out.")
    return repo_id, revision or None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelName:
    """A model as a user named it: a file or folder, a repository on the Hub, or else an architecture.

    An architecture without a tag means the weights that it has: the first of `vitreg list`, or timm's default. Only one
    that has none is drawn at random.

    Attributes:
        path: The file or folder of that name, if there is one.
        revision: Branch, tag or commit; None for the main branch.
        arch: Name of an architecture, ours or timm's, which may not exist.
        tag: Tag of its weights; empty if it has none, or is timm's and was given without.
    """

    given: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    arch: str = ""
    tag: str = ""

    @classmethod
    def parse(cls, given: str | Path) -> Self:
        """Read a name: ``hf-hub:org/name[@revision]``, a path, or an architecture with or without a tag.

        Raises:
            BundleError: It is empty, or the file system does not let us look.
            HubRefusedError: Nothing follows the @.
        """
        text = str(given)
        if text.startswith(HUB_PREFIX):
            repo_id, revision = parse_repo(text)
            return cls(given=text, repo_id=repo_id, revision=revision)
        with readable(given):
            if Path(given).exists():
                return cls(given=text, path=Path(given))
        arch, _, tag = text.partition(".")
        return cls(given=text, arch=arch, tag=tag or next(iter(tags(arch)), ""))

    @property
    def full(self) -> str:
        """The name as given, with the tag."""
        return f"{self.arch}.{self.tag}" if self.tag else self.given

    @property
    def is_ours(self) -> bool:
        """Whether it is an architecture of `vitreg list`."""
        return self.arch in ARCHS

    @property
    def shipped(self) -> Path | None:
        """The folder of the weights in this package that it names."""
        folder = SHIPPED_WEIGHTS / f"{self.arch}.{self.tag}"
        return folder if self.tag in tags(self.arch) and folder.is_dir() else None

    def require_ours(self) -> None:
        """Refuse an architecture or a tag that `vitreg list` does not have, with an UnknownArchError."""
        if not self.is_ours:
            raise self._unknown(ARCHS)
        if self.tag:
            self._require_tag(tags(self.arch))

    def has_weights(self) -> bool:
        """Whether an architecture, ours or timm's, has weights.

        Raises:
            UnknownArchError: Neither this package nor timm has it, or it has no such tag.
        """
        import timm  # takes seconds, and other names do not need it

        if not self.is_ours and not timm.is_model(self.arch):
            raise self._unknown({*timm.list_models(), *ARCHS})
        if self.tag:
            known = [name.partition(".")[2] for name in timm.list_pretrained(f"{self.arch}.*")]
            self._require_tag(known)
        cfg = timm.get_pretrained_cfg(self.full)
        return bool(cfg and cfg.has_weights)

    def require_known(self) -> None:
        """Refuse a name that means nothing, with an UnknownArchError, without opening a model."""
        if self.arch:
            self.has_weights()

    def require_weights(self) -> None:
        """Refuse an architecture that `vitreg list` does not have, or that has no weights there, likewise."""
        self.require_ours()
        if not tags(self.arch):
            raise UnknownArchError(f"{self.arch} has no weights; `vitreg list` prints the tags of those that have.")

    def beside(self) -> list[str]:
        """The paths that it may be a misspelling of: those beside it with nearly its name."""
        path = Path(self.given)
        try:
            there = [other.name for other in path.parent.iterdir()]
        except OSError:
            return []
        return [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, there, n=3)]

    def _require_tag(self, known: Sequence[str]) -> None:
        if self.tag not in known:
            raise UnknownArchError(f"{self.arch} has no weights {self.tag!r}; it has {', '.join(known) or 'none'}.")

    def _unknown(self, known: Collection[str]) -> UnknownArchError:
        near = [*self.beside(), *difflib.get_close_matches(self.given, known, n=3)][:3]
        return UnknownArchError(
            f"there is no folder and no architecture {self.given!r}; closest: {', '.join(near) or 'none'}. "
            "`vitreg list` prints ours, and `timm.list_models()` timm's; a Hub repository needs the prefix "
            f"'{HUB_PREFIX}'."
        )
