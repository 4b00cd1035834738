"""Reading from the Hub, with every failure a user can meet turned into one sentence."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from vitreg_hub.errors import HubError

HUB_PREFIX = "hf-hub:"
BUNDLE_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE) = ("config.json", "model.safetensors", "README.md")
EXTRA_FILES = (ARTIFACTS_FIGURE, CURVES_FIGURE, RECIPE_FILE, METRICS_FILE) = (
    "artifacts.png",
    "curves.png",
    "recipe.yaml",
    "metrics.jsonl",
)
"""What may lie beside a bundle and is published with it: its card shows the figures; of a training run, how it went."""
OPENCLIP_CONFIG, OPENCLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TOWER_SUFFIX = "-open_clip"
"""Ends the name of a folder with both towers of a CLIP model, beside its bundle."""


def parse_repo(name: str) -> tuple[str, str | None]:
    """Split ``[hf-hub:]org/name[@revision]`` into repository and revision, as timm writes them."""
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    return repo_id, revision or None


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `HubError` that says what to do."""
    endpoint = hf.constants.ENDPOINT
    try:
        yield
    except hf_errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no repository id: give it as organisation/name.") from error
    except hf_errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such branch, tag or commit at {endpoint}.") from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubError(
            f"no repository {repo_id} at {endpoint}, or it is private: check the name, and for a private one "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except hf_errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, hf_errors.HfHubHTTPError):
            raise HubError(_refusal(repo_id, error.__cause__)) from error
        raise HubError(
            f"{endpoint} cannot be reached and {repo_id} is not in the cache: check the network or HF_HUB_OFFLINE."
        ) from error
    except hf_errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (httpx.TransportError, hf_errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{endpoint} cannot be reached ({type(error).__name__}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
    except RuntimeError as error:  # how the client reports an upload that broke off
        if not isinstance(error.__cause__, hf_errors.HfHubHTTPError | httpx.TransportError):
            raise
        raise HubError(f"sending to {repo_id} failed ({type(error.__cause__).__name__}): try again.") from error


def _refusal(repo_id: str, error: hf_errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the access token for {repo_id} is missing or invalid: run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"the access token may not do this with {repo_id}: use a token with write permission there."
    reason = " ".join((error.server_message or "no reason given").split())
    return f"the Hub refused the request for {repo_id} with status {status} ({reason})."


def download(name: str) -> Path:
    """Fetch a bundle's files into the cache and return their folder; offline, the cached copy.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.

    Raises:
        HubError: No such repository or revision, no permission, or no network.
    """
    repo_id, revision = parse_repo(name)
    with hub_errors(repo_id):
        return Path(
            hf.snapshot_download(repo_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"])
        )


def download_checkpoint(
    name: str, choose: Callable[[Sequence[str]], str], weight_map: Callable[[Path], Mapping[str, str]]
) -> tuple[Path, list[str]]:
    """Fetch one checkpoint of any repository, with the configurations beside it; offline, the cached copy.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.
        choose: Picks the weights file, or the index of its shards, from the names of the repository's files.
        weight_map: Reads the shard of every tensor from an index.

    Returns:
        The folder, and the names of the chosen file and of its shards.

    Raises:
        HubError: No such repository or revision, no permission, or no network.
    """
    repo_id, revision = parse_repo(name)
    with hub_errors(repo_id):
        folder = Path(hf.snapshot_download(repo_id, revision=revision, allow_patterns=["*.json"]))
        try:
            names = hf.HfApi(library_name="vitreg_hub").list_repo_files(repo_id, revision=revision)
        except (httpx.TransportError, hf_errors.OfflineModeIsEnabled):
            names = [path.name for path in folder.iterdir()]
        chosen = [choose(names)]
        if chosen[0].endswith(".index.json"):
            chosen += sorted(set(weight_map(folder / chosen[0]).values()))
        hf.snapshot_download(repo_id, revision=revision, allow_patterns=chosen)
        return folder, chosen
