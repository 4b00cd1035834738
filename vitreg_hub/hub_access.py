"""Reading from the Hub, with every failure a user can meet turned into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from vitreg_hub.errors import HubError

HUB_PREFIX = "hf-hub:"


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
        raise HubError(f"{repo_id} has no such branch, tag or commit at {endpoint}: {error}") from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubError(
            f"no repository {repo_id} at {endpoint}, or it is private: check the name, and for a private one "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except hf_errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{endpoint} cannot be reached and {repo_id} is not in the cache: check the network or HF_HUB_OFFLINE."
        ) from error
    except hf_errors.EntryNotFoundError as error:
        raise HubError(f"{repo_id} at {endpoint} lacks a file: {error}") from error
    except hf_errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo_id, error)) from error
    except (httpx.TransportError, hf_errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{endpoint} cannot be reached ({type(error).__name__}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error


def _refusal(repo_id: str, error: hf_errors.HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return f"the access token for {repo_id} is missing or invalid: run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"the access token may not do this with {repo_id}: use a token with write permission there."
    return f"the Hub refused the request for {repo_id}: {error}"


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
