"""What the stand-in Hub keeps: users, repositories, commits and files."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import yaml

Response = tuple[int, Mapping[str, str], bytes | Iterable[bytes]]
"""Status, headers, and body or its parts; a given Content-Length may promise more than comes."""


class HubError(Exception):
    """A refusal as the Hub words it: the client picks its exception by status and `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] = {}, **details: str):
        headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}
        self.response: Response = (status, headers, json.dumps({"error": message, **details}).encode())


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card; a YAMLError where it cannot be read."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    metadata = yaml.safe_load(found[1]) if found else None
    return metadata if isinstance(metadata, dict) else {}


@dataclass(frozen=True)
class User:
    """The owner of a token, at home below its own name and its organizations, where it writes unless `read_only`."""

    name: str
    orgs: tuple[str, ...] = ()
    read_only: bool = False


@dataclass(frozen=True)
class Blob:
    """One version of a file: its bytes, and whether Git holds those or a pointer to an LFS object."""

    content: bytes
    lfs: bool = False

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The file's description in listings, of which there are two kinds with names of their own."""
        size, stored, extra = len(self.content), self.content, {}
        if self.lfs:
            sha256 = hashlib.sha256(self.content).hexdigest()
            stored = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
            extra = {"lfs": {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(stored)}}
        oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        return {"oid": oid, "blobId": oid, "size": size, **extra}

    @property
    def etag(self) -> str:
        """The sha256 of an LFS object, or else the id of the Git blob; clients find unchanged files by it."""
        return self.metadata["lfs"]["sha256"] if self.lfs else self.metadata["oid"]


@dataclass(frozen=True)
class Commit:
    """One immutable snapshot of a repository."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))


@dataclass
class Repository:
    """One model repository: its commits, the refs to them by name, and the uploaded LFS objects by sha256."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)  # By ref, such as refs/pr/1.
    lfs_objects: dict[str, Blob] = field(default_factory=dict)
    downloads: int = 0
    likes: int = 0

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The content of every file at a branch, tag or commit."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full oid stands for."""
        oid = (self.branches | self.tags | self.pull_requests).get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {revision!a}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        by_oid, oid, found = {commit.oid: commit for commit in self.commits}, self.resolve(revision).oid, []
        while oid is not None:
            found.append(by_oid[oid])
            oid = found[-1].parent
        return found

    def commit(self, branch: str, title: str, files: Mapping[str, Blob]) -> Commit:
        """Moves `branch` to a new commit that holds exactly `files`."""
        commit = self.add(self.branches.get(branch), title, files)
        self.branches[branch] = commit.oid
        return commit

    def add(self, parent: str | None, title: str, files: Mapping[str, Blob]) -> Commit:
        """Adds a commit that nothing refers to yet."""
        tree = sorted((path, blob.etag) for path, blob in files.items())
        oid = hashlib.sha1(repr((len(self.commits), parent, title, tree)).encode()).hexdigest()
        self.commits.append(Commit(oid, parent, title, files))
        return self.commits[-1]

    @property
    def tags_of_card(self) -> list[str]:
        """What models are found by: the tags of the card's metadata, and license and library."""
        try:
            metadata = front_matter(self.files().get("README.md", b"").decode(errors="replace"))
        except yaml.YAMLError:  # Who pushes by Git can put anything there.
            return []
        license = [f"license:{metadata['license']}"] if "license" in metadata else []
        return [*(metadata.get("tags") or ()), *license, *filter(None, [metadata.get("library_name")])]

    def lfs_object(self, oid: str, size: int) -> Blob:
        """The LFS object, which must have been uploaded."""
        if oid in self.lfs_objects and len(self.lfs_objects[oid].content) == size:
            return self.lfs_objects[oid]
        raise HubError(400, f"LFS object {oid} of {size} bytes was not uploaded")
