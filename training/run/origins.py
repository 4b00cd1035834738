"""The models that a run starts from and learns from, and the license that its own model gets from them."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub as hf
import timm

from vitreg_hub.bundle.provenance import SourceOfRun
from vitreg_hub.environment import public_text
from vitreg_hub.errors import HubError, LicenseError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, SHA256, WEIGHTS_FILE, checksum
from vitreg_hub.licenses import UNKNOWN, is_noncommercial, settle, stated_licenses
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.training.recipes.named import default_license
from vitreg_hub.training.recipes.settings import Recipe

START = "model.start"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model that a run starts from or learns from.

    Attributes:
        setting: The setting of the recipe that names it.
        licenses: The licenses that its files name, without repetition; empty if unknown.
        sha256: Hash of its weights; None where they are not in one local file.
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
        """Its name and origin, in a form that may be published."""
        return public_text(self.name) + (f" ({self.origin})" if self.origin else "")

    def record(self) -> SourceOfRun:
        """Its entry in the provenance: on another machine the name alone may mean another model."""
        license = " and ".join(self.licenses) or None
        return SourceOfRun(name=public_text(self.name), license=license, sha256=self.sha256)


def sources_of(recipe: Recipe) -> tuple[Source, ...]:
    """The start and the teacher of a run, if any. Both were opened before, so nothing large is downloaded."""
    start = {} if recipe.model.start is None else {START: recipe.model.start}
    return tuple(_source(setting, name) for setting, name in {**start, **recipe.task.teachers()}.items())


def license_of(recipe: Recipe, sources: Sequence[Source], *, published: bool) -> str | None:
    """The license of a run's model: that of its sources, or without any the user's or the recipe's own.

    Where sources have different licenses, non-commercial ones take precedence.

    Returns:
        The Hub's identifier; None if it is unknown.

    Raises:
        LicenseError: The user gives another license than a source has, or none where the sources differ; or the model
            is to be published and its license is unknown, or is non-commercial and the user does not confirm it.
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
    # the license of one source says nothing about another that has none
    told = [name for name in named if is_noncommercial(name)]
    if not told and all(source.licenses for source in sources):
        told = named
    own = default_license(recipe)
    if not sources and given is None and own:
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
        sha256=file and checksum(file, like=SHA256),
    )


def _in_folder(setting: str, name: str, folder: Path | None) -> Source:
    """A source described by the files of a bundle or of a model of timm or transformers."""
    if folder is None:
        return Source(setting=setting, name=name)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    weights = folder / WEIGHTS_FILE
    return Source(
        setting=setting,
        name=name,
        licenses=stated_licenses(config, folder / CARD_FILE),
        origin=config["vitreg"]["provenance"]["origin"] if "vitreg" in config else None,
        sha256=checksum(weights, like=SHA256) if weights.is_file() else None,
    )


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """Folder of a repository's commit in the cache, with its card if it can be downloaded."""
    config = hf.try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    with suppress(HubError), hub_errors(repo_id):  # without a card, the configuration has to do
        patiently(partial(hf.hf_hub_download, repo_id, CARD_FILE, revision=folder.name))
    return folder
