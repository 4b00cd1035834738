"""Bundles to the Hub and back. The token is huggingface_hub's: `hf auth login` or HF_TOKEN."""

import shutil
from pathlib import Path

import huggingface_hub as hf

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import require_absent, write_folder
from vitreg_hub.doors import verify
from vitreg_hub.errors import HubError
from vitreg_hub.hub_access import BUNDLE_FILES, CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, download, hub_errors
from vitreg_hub.model_cards.card import render


def require_token(repo_id: str) -> None:
    """Refuse what cannot be published, before any work is done for it.

    Raises:
        HubError: No token, or no repository id.
    """
    with hub_errors(repo_id):
        hf.utils.validate_repo_id(repo_id)
    if hf.get_token() is None:
        raise HubError("no access token: run `hf auth login` or set HF_TOKEN, then try again.")


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Verify a bundle and publish it in one commit; the repository is made if it does not exist.

    A card is written where neither the folder nor the repository has one; one in the repository is never touched.

    Args:
        folder: A bundle's folder.
        repo_id: ``org/name``.
        private: Whether a new repository can be seen by its owner alone.

    Returns:
        Address of the commit.

    Raises:
        BundleError: The folder fails a door; nothing was sent.
        HubError: No token, no permission, or no network.
    """
    folder = Path(folder)
    require_token(repo_id)
    verify(folder)
    with hub_errors(repo_id):
        api = hf.HfApi(library_name="vitreg_hub")
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files: dict[str, str | bytes] = {name: str(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        if not api.file_exists(repo_id, CARD_FILE):
            files[CARD_FILE] = _card(folder, repo_id).encode()
        operations = [hf.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        return api.create_commit(repo_id, operations, commit_message="Add model with vitreg_hub").commit_url


def _card(folder: Path, repo_id: str) -> str:
    """The folder's own card, or a new one where it has none, or still the one that names no repository."""
    bundle, own = ModelBundle.load(folder), folder / CARD_FILE
    if own.exists() and own.read_text() != render(bundle):
        return own.read_text()
    return render(bundle, repo=repo_id)


def pull(name: str, folder: str | Path) -> Path:
    """Fetch a bundle into a new folder, which appears complete or not at all.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.
        folder: Must not exist.

    Raises:
        BundleError: The repository is no bundle, or the folder exists.
        HubError: No such repository or revision, no permission, or no network.
    """
    require_absent(Path(folder))
    cached = download(name)
    ModelBundle.load(cached)

    def fill(staging: Path) -> None:
        for file in BUNDLE_FILES:
            if (cached / file).exists():
                shutil.copyfile(cached / file, staging / file)

    return write_folder(Path(folder), fill)
