"""The models that a run starts from and learns from, and the license that its own model gets by them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import timm

from vitreg_hub.bundle.provenance import SourceOfRun
from vitreg_hub.environment import public_text
from vitreg_hub.errors import HubError, LicenseError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from vitreg_hub.licenses import UNKNOWN, is_noncommercial, settle, stated_licenses
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.training.recipes.named import default_license
from vitreg_hub.training.recipes.settings import Recipe

START = "model.start"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model of which something goes on in the one that is trained.

    Attributes:
        setting: Which setting of the recipe names it.
        name: As it was given.
        licenses: That its files tell, each once; none if nobody knows.
        origin: What it tells of itself, if anything.
        sha256: Of its weights; None where they are not in one file, or not at hand.
    """

    setting: str
    name: str
    licenses: tuple[str, ...] = ()
    origin: str | None = None
    sha256: str | None = None

    def __str__(self) -> str:
        """For messages."""
        return f"{self.setting} {self.name}"

    @property
    def words(self) -> str:
        """For others to read: its name and where it came from."""
        return public_text(self.name) + (f" ({self.origin})" if self.origin else "")

    def record(self) -> SourceOfRun:
        """What provenance tells of it beside its name, which on another machine may mean another model."""
        license = " and ".join(self.licenses) or None
        return SourceOfRun(name=public_text(self.name), license=license, sha256=self.sha256)


def sources_of(recipe: Recipe) -> tuple[Source, ...]:
    """The start and the teacher of a run, if it has them. Both were opened before, so nothing large is fetched."""
    start = {} if recipe.model.start is None else {START: recipe.model.start}
    return tuple(_source(setting, name) for setting, name in {**start, **recipe.task.teachers()}.items())


def license_of(recipe: Recipe, sources: Sequence[Source], *, published: bool) -> str | None:
    """The license of what a run makes: its sources', or of a run without any the user's or the recipe's own.

    Where several sources tell several licenses, those that do not allow every use count before the others.

    Args:
        recipe: The run; its license is what the user says.
        sources: Its start and its teacher.
        published: Whether somebody must say which one it is.

    Returns:
        The Hub's identifier; None if nobody knows.

    Raises:
        LicenseError: The user says another one than a source, or nothing where the sources differ; or, where one must
            be said, nobody says one, or the sources' does not allow every use and the user does not say so too.
    """
    given = recipe.license
    for source in sources:
        told = source.licenses
        if told and given not in (None, UNKNOWN) and not any(given.lower() in other.licenses for other in sources):
            raise LicenseError(
                f"recipe {recipe.name} has the license {given}, but {source} is under {' and '.join(told)}: give "
                f"--license {told[0]}, or another model there."
            )
    named = sorted({license for source in sources for license in source.licenses})
    # what one source tells does not hold for another that tells nothing
    told = [name for name in named if is_noncommercial(name)] or (named if all(s.licenses for s in sources) else [])
    if not sources and given is None and (own := default_license(recipe)):
        told = [own]
    if given is None and not published and len(told) < 2:
        return told[0] if told else None
    return settle(told, given, called=" and ".join(map(str, sources)) or f"the weights of recipe {recipe.name}")


def _source(setting: str, name: str) -> Source:
    parsed = ModelName.parse(name)
    if parsed.repo_id:
        return _in_folder(setting, name, _cached(parsed.repo_id, parsed.revision))
    if folder := parsed.path or parsed.shipped:
        return _in_folder(setting, name, folder)
    cfg = timm.get_pretrained_cfg(name)
    repo_id = cfg and cfg.hf_hub_id
    weights = hf.try_to_load_from_cache(repo_id, WEIGHTS_FILE) if repo_id else None
    file = Path(weights) if isinstance(weights, str) else None
    return Source(
        setting=setting,
        name=name,
        licenses=stated_licenses({"pretrained_cfg": {"license": cfg and cfg.license}}, Path()),
        origin=f"weights of {HUB_PREFIX}{repo_id}@{file.parent.name}" if file else None,
        sha256=file and _sha256(file),
    )


def _in_folder(setting: str, name: str, folder: Path | None) -> Source:
    """What the files of a bundle, or of a model of timm or transformers, tell."""
    if folder is None:
        return Source(setting=setting, name=name)
    config, weights = _config(folder), folder / WEIGHTS_FILE
    return Source(
        setting=setting,
        name=name,
        licenses=stated_licenses(config, folder / CARD_FILE),
        origin=config["vitreg"]["provenance"]["origin"] if "vitreg" in config else None,
        sha256=_sha256(weights) if weights.is_file() else None,
    )


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """Folder of a repository's commit in the cache, with its card, if that can be had."""
    config = hf.try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    with suppress(HubError), hub_errors(repo_id):  # without a card the configuration alone tells
        patiently(partial(hf.hf_hub_download, repo_id, CARD_FILE, revision=folder.name))
    return folder


def _config(folder: Path) -> Mapping[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
