"""Talking to the Hub: with patience where that is safe, and one sentence for every failure that a user can meet."""

import errno
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from vitreg_hub.errors import HubError, HubRefusedError

Result = TypeVar("Result")


WAITS = (1, 2, 4)
"""Seconds between the tries of a request."""
REACHED = 3
"""Seconds in which something must answer at the Hub's address."""
LONGEST_WAIT = 300
"""Seconds: the Hub counts requests in windows of five minutes (https://huggingface.co/docs/hub/rate-limits)."""
MAY_PASS = (408, 409, 412, 423, 425, 429)
"""Statuses of requests that the Hub may accept later; others below 500 are refusals."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
"""Errors of a folder that cannot be made."""


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
    """Whether a reply is not JSON, or a file is shorter than announced, which the client reports as a bare OSError."""
    return isinstance(error, json.JSONDecodeError) or (type(error) is OSError and error.errno is None)


def reach() -> None:
    """Look once whether anything answers at the Hub's address: the client tries for minutes. A proxy is not asked.

    Raises:
        httpx.ConnectError: Nothing does.
    """
    where = urlsplit(hf.constants.ENDPOINT)
    if hf.constants.HF_HUB_OFFLINE or getproxies() or where.hostname is None:
        return
    port = where.port or (80 if where.scheme == "http" else 443)
    try:
        socket.create_connection((where.hostname, port), timeout=REACHED).close()
    except OSError as error:
        raise httpx.ConnectError(str(error)) from error


def patiently(request: Callable[[], Result]) -> Result:
    """Make a request that may safely be repeated, and repeat it after failures that may pass.

    Raises:
        HubError: What answers is not a Hub, or a download from Xet, the Hub's storage, broke off.
        httpx.TransportError: From the client, as is huggingface_hub's HfHubHTTPError.
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
        except RuntimeError as error:  # how hf_xet reports a download that broke off, after several tries
            raise HubError(f"fetching failed ({one_line(error)}): try again, or set HF_HUB_DISABLE_XET=1.") from error
        except (AttributeError, LookupError, TypeError) as error:  # how the client meets JSON of another kind
            raise HubError(no_hub()) from error
    raise AssertionError("the last try either returns or raises")


def no_hub() -> str:
    """The message for replies that cannot be understood."""
    return f"{hf.constants.ENDPOINT} does not answer like a Hub: check HF_ENDPOINT, proxy and network."


def pause(error: BaseException, wait: float) -> None:
    """Wait before the next try; where the Hub limits requests, until it accepts more, up to `LONGEST_WAIT`."""
    if isinstance(error, hf_errors.HfHubHTTPError):
        headers = error.response.headers
        limit = hf.utils.parse_ratelimit_headers(headers)
        if limit is not None and limit.remaining == 0:
            wait = max(wait, limit.reset_in_seconds + 1)
        elif headers.get("Retry-After", "").isdecimal():
            wait = max(wait, int(headers["Retry-After"]) + 1)
    time.sleep(min(wait, LONGEST_WAIT))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a `HubError` that says what to do."""
    endpoint = hf.constants.ENDPOINT
    try:
        yield
    except hf_errors.HFValidationError as error:
        raise HubRefusedError(f"{repo_id!r} is not a repository id: give it as organisation/name.") from error
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
        raise _missing(repo_id, error) from error
    except hf_errors.HfHubHTTPError as error:
        raise _refusal(repo_id, error) from error
    except (httpx.TransportError, ConnectionError, TimeoutError) as error:  # hf_xet raises Python's own
        raise HubError(
            f"{endpoint} cannot be reached ({type(error).__name__}): check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
    except UnicodeEncodeError as error:
        raise HubRefusedError(
            "the access token has characters that no token has: run `hf auth login` or set HF_TOKEN."
        ) from error
    except OSError as error:
        of_cache = error.filename is None or _is_of_cache(Path(str(error.filename)))
        if error.errno in DISK_ERRORS and not of_cache:
            raise HubError(
                f"{error.filename} cannot be used ({error.strerror}): look at the file and its disk."
            ) from error
        if error.errno not in (*DISK_ERRORS, *NO_FOLDER) or not of_cache:
            raise
        raise HubError(
            f"the cache of the Hub at {hf.constants.HF_HUB_CACHE} cannot be written ({error.strerror}): "
            "make room, or set HF_HOME to another folder."
        ) from error


def _is_of_cache(path: Path) -> bool:
    """Whether a path leads to the client's cache, lies in it or beside it."""
    cache, home = Path(hf.constants.HF_HUB_CACHE), Path(hf.constants.HF_HOME)
    return cache.is_relative_to(path) or path.is_relative_to(cache) or path.is_relative_to(home)


def _missing(repo_id: str, error: hf_errors.LocalEntryNotFoundError) -> HubError:
    """Why something that is not in the cache could not be fetched."""
    if isinstance(error.__cause__, hf_errors.HfHubHTTPError):
        return _refusal(repo_id, error.__cause__)
    endpoint = hf.constants.ENDPOINT
    if isinstance(error.__cause__, hf_errors.FileMetadataError):
        return HubError(no_hub())
    partial = isinstance(error, hf_errors.IncompleteSnapshotError)
    missing = f"only a part of {repo_id} is" if partial else f"{repo_id} is not"
    return HubError(f"{endpoint} cannot be reached and {missing} in the cache: check the network or HF_HUB_OFFLINE.")


def _refusal(repo_id: str, error: hf_errors.HfHubHTTPError) -> HubError:
    status = error.response.status_code
    refused = status < 500 and status not in MAY_PASS
    return (HubRefusedError if refused else HubError)(_reason(repo_id, error))


def _reason(repo_id: str, error: hf_errors.HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the access token for {repo_id} is missing or invalid: run `hf auth login` or set HF_TOKEN."
    if status == 403:
        reason = f" ({one_line(error.server_message).rstrip('.')})" if error.server_message else ""
        needed = (
            "that may read it" if error.response.request.method in ("GET", "HEAD") else "with write permission there"
        )
        return f"the access token may not do this with {repo_id}{reason}: use a token {needed}."
    if status == 429:
        return f"the Hub accepts no more requests for {repo_id} for now (status 429): wait some minutes and try again."
    if status >= 500:
        return f"the Hub failed with status {status} for {repo_id}: try again later."
    return f"the Hub refused the request for {repo_id} with status {status} ({one_line(error.server_message)})."


def one_line(reason: object) -> str:
    """The words of a library or server on one line, to put into a sentence."""
    return " ".join(str(reason or "no reason given").split())
