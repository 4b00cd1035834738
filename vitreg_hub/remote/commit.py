"""One commit on a branch of the Hub, made once or not at all, whatever the network does.

huggingface_hub sends a commit once and reports a lost reply as a failure. This module then looks at the branch; if the
commit is not there, it is sent again, which is safe because a commit names its parent.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2 as httpx
import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from vitreg_hub.errors import HubError
from vitreg_hub.files import checksum
from vitreg_hub.remote.client import WAITS, is_transient, no_hub, one_line, patiently, pause

Files = Mapping[str, Path | bytes | None]
"""Files or their content, by name in the repository; None for a file to delete."""
HUBS_OWN = ".gitattributes"
"""The Hub itself changes it in a commit whose large files need a line there."""
NOTHING_IGNORED = "#"
"""Replaces a repository's own .gitignore, for which the client silently leaves files out of a commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refs:
    """The branches and tags of a repository, each with its commit."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """The files of a commit, each with the Hub's checksum, and whether its repository is private."""

    commit: str
    private: bool
    checksums: Mapping[str, str | None]

    def changed(self, files: Files) -> Files:
        """The files that are new, differ from the commit's, or are to be deleted from it."""
        return {name: content for name, content in files.items() if not self._has(name, content)}

    def follows(self, parent: "Tree", files: Files) -> bool:
        """Whether this commit is its parent with these files written to it."""
        kept = {name: old for name, old in parent.checksums.items() if name not in {*files, HUBS_OWN}}
        written = {name for name, content in files.items() if content is not None}
        return (
            self.checksums.keys() - {HUBS_OWN} == (kept.keys() | written) - {HUBS_OWN}
            and all(self.checksums[name] == old for name, old in kept.items())
            and not self.changed(files)
        )

    def _has(self, name: str, content: Path | bytes | None) -> bool:
        there = self.checksums.get(name)
        if content is None:
            return there is None
        return there is not None and checksum(content, like=there) == there


def read_refs(api: hf.HfApi, repo_id: str) -> Refs | None:
    """The branches and tags of a repository; None if there is none that the user can see."""
    try:
        refs = patiently(partial(api.list_repo_refs, repo_id))
    except hf_errors.GatedRepoError:
        raise
    except hf_errors.RepositoryNotFoundError:
        return None
    return Refs(
        branches={ref.name: ref.target_commit for ref in refs.branches},
        tags={ref.name: ref.target_commit for ref in refs.tags},
    )


def read_tree(api: hf.HfApi, repo_id: str, commit: str) -> Tree:
    """The files of a commit with their checksums."""
    info = patiently(partial(api.model_info, repo_id, revision=commit, files_metadata=True))
    checksums = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
    return Tree(commit=commit, private=bool(info.private), checksums=checksums)


def commit_files(api: hf.HfApi, repo_id: str, files: Files, *, branch: str, parent: Tree, message: str) -> str:
    """Put files on an existing branch in one commit, and return its id; other files stay.

    Raises:
        HubError: Someone else moved the branch, or the upload broke off; nothing of it is on the branch.
    """
    operations = _operations(repo_id, files)
    for wait in (*WAITS, None):
        try:
            return _send(api, repo_id, operations, branch=branch, parent=parent, message=message).oid
        except (hf_errors.HfHubHTTPError, httpx.TransportError, json.JSONDecodeError) as error:
            refused = isinstance(error, hf_errors.HfHubHTTPError) and error.response.status_code == 412
            if not refused and not (is_transient(error) and _is_about_the_commit(error)):
                raise
            try:
                landed = _landed(api, repo_id, files, branch=branch, parent=parent)
            except (hf_errors.HfHubHTTPError, httpx.TransportError, json.JSONDecodeError) as silence:
                raise HubError(
                    f"the Hub's reply to the commit to {repo_id} was lost, and the Hub does not say whether the commit "
                    "is there: push again later, nothing is sent twice."
                ) from silence
            if landed:
                return landed
            if wait is None and isinstance(error, json.JSONDecodeError):
                raise HubError(no_hub()) from error
            if wait is None:
                raise
            pause(error, wait)
    raise AssertionError("the last try either returns or raises")


def open_pull_request(
    api: hf.HfApi, repo_id: str, files: Files, *, branch: str, parent: Tree, message: str
) -> hf.CommitInfo:
    """Propose files for a branch. The request is sent once only, or there could be two pull requests.

    Raises:
        HubError: The reply was lost.
    """
    operations = _operations(repo_id, files)
    try:
        return _send(api, repo_id, operations, branch=branch, parent=parent, message=message, create_pr=True)
    except (hf_errors.HfHubHTTPError, httpx.TransportError, json.JSONDecodeError) as error:
        if not (is_transient(error) and _is_about_the_commit(error)):
            raise
        raise HubError(
            f"the Hub's reply to the pull request was lost: look for it at {api.endpoint}/{repo_id}/discussions before "
            "you push again."
        ) from error


def set_tag(api: hf.HfApi, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit, unless it has the tag already.

    Raises:
        HubError: The tag is at another commit.
    """
    try:
        patiently(partial(api.create_tag, repo_id, tag=tag, revision=commit))
    except hf_errors.HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        refs = read_refs(api, repo_id)
        if refs is None or refs.tags.get(tag) != commit:
            raise HubError(f"{repo_id} has a tag {tag} at another commit: choose another tag.") from error


def _operations(repo_id: str, files: Files) -> list[hf.CommitOperationAdd | hf.CommitOperationDelete]:
    """The parts of a commit. The client marks in them what it has hashed and sent, and does not repeat it."""
    operations = []
    with _refusals(repo_id):
        for name, content in files.items():
            if content is None:
                operations.append(hf.CommitOperationDelete(path_in_repo=name))
            else:
                content = content if isinstance(content, bytes) else str(content)
                operations.append(hf.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content))
    return operations


def _send(
    api: hf.HfApi,
    repo_id: str,
    operations: Sequence[hf.CommitOperationAdd | hf.CommitOperationDelete],
    *,
    branch: str,
    parent: Tree,
    message: str,
    create_pr: bool = False,
) -> hf.CommitInfo:
    """Upload files and commit them."""
    with _refusals(repo_id):
        api.preupload_lfs_files(
            repo_id,
            [operation for operation in operations if isinstance(operation, hf.CommitOperationAdd)],
            revision=branch,
            create_pr=create_pr,
            free_memory=False,
            gitignore_content=NOTHING_IGNORED,
        )
        return api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=branch,
            parent_commit=parent.commit,
            create_pr=create_pr,
        )


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """Turn the client's errors about uploads and files into a `HubError`."""
    try:
        yield
    except (hf_errors.HfHubHTTPError, hf_errors.OfflineModeIsEnabled, json.JSONDecodeError):
        raise
    except (RuntimeError, ConnectionError, TimeoutError) as error:  # an upload that broke off, after several tries
        by_xet = error.__cause__ is None
        reason = one_line(error) if by_xet else type(error.__cause__).__name__
        remedy = "try again, or set HF_HUB_DISABLE_XET=1" if by_xet else "try again"
        raise HubError(f"sending to {repo_id} failed ({reason}): nothing is there, {remedy}.") from error
    except ValueError as error:  # about a card's metadata, or the LFS server's reply
        raise HubError(f"the Hub does not accept a file for {repo_id}: {one_line(error).rstrip('.')}.") from error


def _is_about_the_commit(error: BaseException) -> bool:
    """Whether the failed request is one that the client sends once only; it repeats all others by itself."""
    if isinstance(error, hf_errors.HfHubHTTPError):
        path = error.response.request.url.path
    elif isinstance(error, httpx.TransportError):
        path = error.request.url.path
    else:  # an unreadable reply does not say
        return True
    return path.endswith("/validate-yaml") or "/commit/" in path


def _landed(api: hf.HfApi, repo_id: str, files: Files, *, branch: str, parent: Tree) -> str | None:
    """The commit that put files on a branch; None if the branch has not moved; refuses commits of others."""
    commits = [commit.commit_id for commit in api.list_repo_commits(repo_id, revision=branch)]  # newest first
    if commits[0] == parent.commit:
        return None
    if parent.commit in commits:
        next_one = commits[commits.index(parent.commit) - 1]
        if read_tree(api, repo_id, next_one).follows(parent, files):
            return next_one
    raise HubError(
        f"someone else pushed to {repo_id} ({branch}) meanwhile: nothing of this push is there, run it again to push "
        "on top of theirs."
    )
