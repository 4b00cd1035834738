"""What a push puts into a repository: a bundle's files and no others, with its license and a card."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import huggingface_hub as hf

from vitreg_hub import licenses
from vitreg_hub.bundle.config import config_text, read_config
from vitreg_hub.bundle.doors import bundle_folder
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import provenance_to_json
from vitreg_hub.errors import BundleError, readable
from vitreg_hub.files import (
    BUNDLE_FILES,
    CARD_FILE,
    CONFIG_FILE,
    EXTRA_FILES,
    OPENCLIP_CONFIG,
    OPENCLIP_WEIGHTS,
    TOWER_SUFFIX,
    WEIGHTS_FILE,
    find_tower,
)
from vitreg_hub.hub.towers import TOWERS_BLOCK, tower_files
from vitreg_hub.model_cards.card import decoded, render, update
from vitreg_hub.model_cards.marked import blocks_in, replace_blocks, require_whole
from vitreg_hub.model_cards.merging import merge
from vitreg_hub.remote.commit import Files

PICKLES = frozenset(
    [".bin", ".pt", ".pth", ".pyth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".hdf5", ".keras"]
)
"""Weights that can run code when they are opened, or that nobody needs beside safetensors."""

Verify = Callable[..., Mapping[str, float]]
"""Opens a bundle like `doors.verify`, with the same arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipment:
    """What one repository is to hold.

    Attributes:
        files: All but the card.
        card: Makes the card out of the one on the Hub, or out of None.
        own_card: The folder's card, if it has one.
        left_out: What the folder also holds, which is not published.
    """

    repo_id: str
    title: str
    license: str | None
    given_license: str | None
    files: Files
    card: Callable[[str | None], str]
    own_card: str | None = None
    left_out: tuple[str, ...]


def make_shipments(
    source: str | Path, repo_id: str, *, branch: str, license: str | None, verify: Verify
) -> tuple[Shipment, Shipment | None]:
    """What the repositories of a bundle, and of both towers beside it, are to hold; arguments as of `push`.

    Raises:
        BundleError: The folder fails a door or holds pickles.
        LicenseError: No license is stated, or bundle, card and user contradict each other.
    """
    folder = bundle_folder(source)
    with readable(folder):
        towers = find_tower(folder)
        _refuse_pickles(folder)
        if towers is not None:
            _refuse_pickles(towers)
        bundle = ModelBundle.load(folder)
        stated = licenses.stated_licenses(bundle.to_json(), folder / CARD_FILE)
        settled = licenses.settle(stated, license, called=str(folder))  # before the doors, which take seconds
        told = dataclasses.replace(bundle.provenance, license=settled, doors=verify(folder, bundle=bundle))
        bundle = dataclasses.replace(bundle, provenance=told)
        where = {"repo": repo_id, "revision": branch, "towers": towers is not None}
        shipment = _bundle_shipment(folder, bundle, where, given_license=license)
        if towers is None:
            return shipment, None
        return shipment, _tower_shipment(towers, repo_id, branch=branch, license=settled)


def _bundle_shipment(
    folder: Path, bundle: ModelBundle, where: Mapping[str, Any], *, given_license: str | None
) -> Shipment:
    """What a bundle's repository is to hold: extra files that are not in the folder are deleted there."""
    extras = [name for name in EXTRA_FILES if (folder / name).is_file()]
    files: dict[str, Path | bytes | None] = {name: folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, *extras)}
    files |= dict.fromkeys(set(EXTRA_FILES) - set(extras))
    old = read_config(folder, called=str(folder))
    config = _with_provenance(old, bundle)
    if config != old:
        files[CONFIG_FILE] = config_text(config).encode()
    own_card = _own_card(folder)

    def card(existing: str | None) -> str:
        before = own_card if existing is None else existing
        if before is None:
            return render(bundle, files=extras, **where)
        return update(before, bundle, files=extras, settled_license=True, **where)

    return Shipment(
        repo_id=where["repo"],
        title=f"Publish {bundle.arch} with vitreg_hub",
        license=bundle.provenance.license,
        given_license=given_license,
        files=files,
        card=card,
        own_card=own_card,
        left_out=_others(folder, (*BUNDLE_FILES, *EXTRA_FILES)),
    )


def _tower_shipment(folder: Path, bundle_repo: str, *, branch: str, license: str | None) -> Shipment:
    """What the repository of both towers beside a bundle is to hold."""
    files = dict(tower_files(folder, bundle_repo=bundle_repo, branch=branch, license=license))
    card = cast(bytes, files.pop(CARD_FILE)).decode()
    return Shipment(
        repo_id=bundle_repo + TOWER_SUFFIX,
        title=f"Publish both towers of {bundle_repo.rpartition('/')[2]} with vitreg_hub",
        license=license,
        given_license=license,
        files=files,
        card=lambda existing: card if existing is None else _towers_card(existing, card),
        left_out=_others(folder, (CONFIG_FILE, OPENCLIP_CONFIG, OPENCLIP_WEIGHTS)),
    )


def _with_provenance(config: Mapping[str, Any], bundle: ModelBundle) -> dict[str, Any]:
    """A config.json with the provenance and the license of a bundle."""
    new, license = copy.deepcopy(dict(config)), bundle.provenance.license
    new["vitreg"]["provenance"] = provenance_to_json(bundle.provenance)
    new["pretrained_cfg"].pop("license", None)
    if license is not None:
        new["pretrained_cfg"]["license"] = license
    return new


def _own_card(folder: Path) -> str | None:
    """The card in a bundle's folder; the Hub accepts only UTF-8."""
    file = folder / CARD_FILE
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 (byte {error.start}): save it in UTF-8, or delete it.") from error
    return decoded(content)


def _towers_card(existing: str, fresh: str) -> str:
    """The card of both towers that is on the Hub, with our block and the license brought up to date."""
    require_whole(existing)
    if TOWERS_BLOCK not in blocks_in(existing):
        return existing
    data = hf.ModelCard(fresh).data.to_dict()
    card = replace_blocks(existing, {TOWERS_BLOCK: blocks_in(fresh)[TOWERS_BLOCK]})
    return merge(card, old=data, new=data, settled_license=True) or card


def _refuse_pickles(folder: Path) -> None:
    """Refuse weights other than safetensors. Subfolders are never published."""
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in PICKLES)
    if found:
        raise BundleError(
            f"{folder} holds {', '.join(found)}: such files can run code when they are opened, and only "
            "safetensors are published; move or delete them."
        )


def _others(folder: Path, known: tuple[str, ...]) -> tuple[str, ...]:
    names = (f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return tuple(sorted(name for name in names if name not in known))
