"""What a push puts into a repository: a bundle's files and no others, with its license told and a card."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import config_text, read_config
from vitreg_hub.errors import BundleError
from vitreg_hub.hub_access import (
    BUNDLE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    EXTRA_FILES,
    OPENCLIP_CONFIG,
    OPENCLIP_WEIGHTS,
    TOWER_SUFFIX,
    WEIGHTS_FILE,
)
from vitreg_hub.hub_commit import Files
from vitreg_hub.hub_tower import tower_files
from vitreg_hub.model_cards.card import decoded, render, update

PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".hdf5",
    ".keras",
    ".pyth",
)
"""Endings of weights that can run code when they are opened, or that nobody needs beside safetensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipment:
    """What one repository is to hold.

    Attributes:
        repo_id: ``org/name``.
        title: Of the commit.
        license: Under which it is published; None if nobody knows.
        files: All but the card.
        card: Makes the card of the one that is on the Hub, if any.
        left_out: Names in the folder that are not published.
    """

    repo_id: str
    title: str
    license: str | None
    files: Files
    card: Callable[[str | None], str]
    left_out: tuple[str, ...]


def bundle_shipment(folder: Path, bundle: ModelBundle, repo_id: str, *, license: str | None) -> Shipment:
    """What a bundle's repository is to hold. Its config.json and card tell the license; the folder stays as it is.

    Args:
        folder: Verified.
        bundle: What is in it.
        repo_id: ``org/name``.
        license: Under which it is published; None if nobody knows.
    """
    extras = [name for name in EXTRA_FILES if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, *extras)}
    if license != bundle.provenance.license:
        bundle = dataclasses.replace(bundle, provenance=dataclasses.replace(bundle.provenance, license=license))
        config = read_config(folder, called=str(folder))
        for entry in (config["vitreg"]["provenance"], config["pretrained_cfg"]):
            entry["license"] = license
        if license is None:
            del config["pretrained_cfg"]["license"]
        files[CONFIG_FILE] = config_text(config).encode()

    def card(existing: str | None) -> str:
        own = folder / CARD_FILE
        if existing is None and own.is_file():
            existing = decoded(own.read_bytes())
        if existing is None:
            return render(bundle, repo=repo_id, files=extras)
        return update(existing, bundle, repo=repo_id, files=extras)

    return Shipment(
        repo_id=repo_id,
        title=f"Publish {bundle.arch} with vitreg_hub",
        license=license,
        files=files,
        card=card,
        left_out=_others(folder, (*BUNDLE_FILES, *EXTRA_FILES)),
    )


def tower_shipment(folder: Path, bundle_repo: str, *, branch: str, license: str | None) -> Shipment:
    """What the repository of both towers beside a bundle is to hold. A card that is there stays.

    Raises:
        BundleError: Files are missing or broken.
    """
    files = dict(tower_files(folder, bundle_repo=bundle_repo, branch=branch, license=license))
    card = files.pop(CARD_FILE).decode()
    return Shipment(
        repo_id=bundle_repo + TOWER_SUFFIX,
        title=f"Publish both towers of {bundle_repo.rpartition('/')[2]} with vitreg_hub",
        license=license,
        files=files,
        card=lambda existing: card if existing is None else existing,
        left_out=_others(folder, (CONFIG_FILE, OPENCLIP_CONFIG, OPENCLIP_WEIGHTS)),
    )


def refuse_pickles(folder: Path) -> None:
    """Refuse weights that are no safetensors. Folders below are never published.

    Raises:
        BundleError: With their names.
    """
    if not folder.is_dir():
        return
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in PICKLES)
    if found:
        raise BundleError(
            f"{folder} holds {', '.join(found)}: such files can run code when they are opened, and only "
            "safetensors are published; move or delete them."
        )


def _others(folder: Path, known: tuple[str, ...]) -> tuple[str, ...]:
    names = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return tuple(sorted(name for name in names if name not in known))
