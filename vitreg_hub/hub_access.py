"""Talking to the Hub: patient where that is safe, and with every failure a user can meet turned into one sentence."""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from vitreg_hub.errors import HubError, HubRefusedError

Result = TypeVar("Result")

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
"""Ends the name of a folder with both towers of a CLIP model, beside its bundle, and of its repository."""

WAITS = (1, 2, 4)
"""Seconds between one try of a request and the next."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def parse_repo(name: str) -> tuple[str, str | None]:
    """Split ``[hf-hub:]org/name[@revision]`` into repository and revision, as timm writes them."""
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    return repo_id, revision or None


def checksum(content: Path | bytes, *, like: str) -> str:
    """The checksum of a file, of the kind that the Hub keeps of it.

    Args:
        content: The file, or what is in it.
        like: A checksum of that kind, in hexadecimal: sha256 of a large file (LFS), Git's sha1 of any other.
    """
    if len(like) == 40:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_transient(error: BaseException | None) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, hf_errors.HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, hf_errors.LocalEntryNotFoundError):  # nothing in the cache, and the Hub failed
        return is_transient(error.__cause__)
    if isinstance(error, httpx.TransportError):
        return not isinstance(error, httpx.ProxyError | httpx.UnsupportedProtocol)
    return _is_garbled(error)


def _is_garbled(error: BaseException | None) -> bool:
    """Whether a reply is no JSON, or a file shorter than announced, of which the client makes a bare OSError."""
    return isinstance(error, json.JSONDecodeError) or (type(error) is OSError and error.errno is None)


def patiently(request: Callable[[], Result]) -> Result:
    """Make a request that may be made twice, again where it fails for reasons that pass.

    Raises:
        HubError: What answers is no Hub.
        httpx.TransportError: As the client raises it, and so is huggingface_hub's HfHubHTTPError.
    """
    for wait in (*WAITS, None):
        try:
            return request()
        except (OSError, httpx.TransportError, json.JSONDecodeError) as error:
            if wait is None and _is_garbled(error):
                raise HubError(no_hub()) from error
            if wait is None or not is_transient(error):
                raise
            pause(error, wait)
    raise AssertionError("the last try either returns or raises")


def no_hub() -> str:
    """The sentence for replies that cannot be understood."""
    return f"what {hf.constants.ENDPOINT} answers is not what a Hub does: check HF_ENDPOINT, proxy and network."


def pause(error: BaseException, wait: float) -> None:
    """Wait before the next try, and where the Hub limits requests, until it takes more."""
    if isinstance(error, hf_errors.HfHubHTTPError):
        limit = hf.utils.parse_ratelimit_headers(error.response.headers)
        if limit is not None and limit.remaining == 0:
            wait = max(wait, limit.reset_in_seconds + 1)
    time.sleep(wait)


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `HubError` that says what to do."""
    endpoint = hf.constants.ENDPOINT
    try:
        yield
    except hf_errors.HFValidationError as error:
        raise HubRefusedError(f"{repo_id!r} is no repository id: give it as organisation/name.") from error
    except hf_errors.RevisionNotFoundError as error:
        raise HubRefusedError(f"{repo_id} has no such branch, tag or commit at {endpoint}.") from error
    except hf_errors.GatedRepoError as error:
        raise HubRefusedError(
            f"{repo_id} is gated: ask for access at {endpoint}/{repo_id}, then run `hf auth login` or set HF_TOKEN."
        ) from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubRefusedError(
            f"no repository {repo_id} at {endpoint}, or it is private: check the name, and for a private one "
            "run `hf auth login` or set HF_TOKEN."
        ) from error
    except hf_errors.LocalEntryNotFoundError as error:
        raise HubError(_lacking(repo_id, error)) from error
    except hf_errors.HfHubHTTPError as error:
        kind = HubRefusedError if error.response.status_code in (401, 403) else HubError
        raise kind(_refusal(repo_id, error)) from error
    except (httpx.TransportError, hf_errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{endpoint} cannot be reached ({type(error).__name__}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
    except hf_errors.XetDownloadError as error:
        raise HubError(f"fetching {repo_id} failed ({one_line(error)}): try again.") from error
    except OSError as error:
        cache = hf.constants.HF_HUB_CACHE
        if error.errno not in DISK_ERRORS:
            raise
        if error.filename is not None and not str(error.filename).startswith(cache):
            raise HubError(
                f"{error.filename} cannot be used ({error.strerror}): look at the file and its disk."
            ) from error
        raise HubError(
            f"the cache of the Hub at {cache} cannot be written ({error.strerror}): "
            "make room, or set HF_HOME to another folder."
        ) from error


def _lacking(repo_id: str, error: hf_errors.LocalEntryNotFoundError) -> str:
    """What is not in the cache and could not be fetched, and why not."""
    if isinstance(error.__cause__, hf_errors.HfHubHTTPError):
        return _refusal(repo_id, error.__cause__)
    endpoint = hf.constants.ENDPOINT
    if isinstance(error.__cause__, hf_errors.FileMetadataError):
        return no_hub()
    partial = isinstance(error, hf_errors.IncompleteSnapshotError)
    missing = f"only a part of {repo_id} is" if partial else f"{repo_id} is not"
    return f"{endpoint} cannot be reached and {missing} in the cache: check the network or HF_HUB_OFFLINE."


def _refusal(repo_id: str, error: hf_errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the access token for {repo_id} is missing or invalid: run `hf auth login` or set HF_TOKEN."
    if status == 403:
        return f"the access token may not do this with {repo_id}: use a token with write permission there."
    if status == 429:
        return f"the Hub takes no more requests for {repo_id} for now (status 429): wait some minutes and try again."
    if status >= 500:
        return f"the Hub failed with status {status} for {repo_id}: try again later."
    return f"the Hub refused the request for {repo_id} with status {status} ({one_line(error.server_message)})."


def one_line(reason: object) -> str:
    """What a library or a server says, fit for a sentence."""
    return " ".join(str(reason or "no reason given").split())
