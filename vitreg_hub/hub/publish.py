"""Bundles to the Hub and back, with huggingface_hub's access token (`hf auth login` or HF_TOKEN)."""

import dataclasses
import shlex
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub as hf

from vitreg_hub.bundle import doors
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import HubError, HubRefusedError
from vitreg_hub.files import BUNDLE_FILES, EXTRA_FILES, new_folder, require_absent, require_space
from vitreg_hub.hub.shipment import Shipment, Verify, make_shipments
from vitreg_hub.hub.target import Target, compare, look
from vitreg_hub.remote.client import hub_errors, patiently, reach
from vitreg_hub.remote.commit import commit_files, open_pull_request, set_tag
from vitreg_hub.remote.download import download


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        commit: The commit that holds the bundle: a new one, or the old one if nothing had changed.
        text_tower: The same for both towers' repository, if there is one.
    """

    repo_id: str
    commit: str
    url: str
    private: bool
    pull_request: str | None = None
    sent: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()
    text_tower: "Pushed | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedFile:
    """A file of a planned push: its size in bytes, and whether it is new, changed, unchanged or deleted."""

    name: str
    size: int
    state: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PushPlan:
    """What a push would do.

    Attributes:
        text_tower: The same for both towers' repository.
    """

    repo_id: str
    branch: str
    makes_repository: bool
    makes_branch: bool
    license: str | None
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]
    text_tower: "PushPlan | None" = None


def require_token(repo_id: str) -> None:
    """Refuse early what cannot be published.

    Raises:
        HubError: There is no token, or this is not a repository id.
    """
    _require_repo_id(repo_id)
    token = hf.get_token()
    if token is None:
        raise HubRefusedError("no access token: run `hf auth login` or set HF_TOKEN, then try again.")
    if not token.isascii():
        raise HubRefusedError("the access token has characters that no token has: run `hf auth login` or set HF_TOKEN.")


def _require_repo_id(repo_id: str) -> None:
    with hub_errors(repo_id):
        hf.utils.validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise HubRefusedError(f"{repo_id!r} is not a repository id: give it as organisation/name.")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    create_pr: bool = False,
    tag: str | None = None,
    license: str | None = None,
    verify: Verify = doors.verify,
) -> Pushed:
    """Verify a bundle and publish it in one commit; repository and branch are made if they do not exist.

    Only new and changed files are sent; without any, no commit is made. The commit fails if someone else pushes at the
    same time. In a card that is on the Hub, only this package's blocks change. Both towers of a CLIP model, in the
    neighbouring folder that ends in `-open_clip`, follow in a repository of their own.

    Args:
        private: Whether only its owner will see a new repository.
        branch: Branch of the commit; a new one starts from main.
        create_pr: Whether to open a pull request instead, a new one each time.
        license: License of the weights, if the bundle states none, or a non-commercial one.

    Raises:
        BundleError: The folder fails a door or holds pickles; nothing was sent.
        LicenseError: No license is stated, or it is a non-commercial one and `license` does not agree to it.
        HubError: No token, no permission, no network, or someone else pushed. The repository is as it was, unless the
            message says otherwise.
    """
    require_token(repo_id)
    target = Target(branch=branch, private=private, create_pr=create_pr, tag=tag)
    with hub_errors(repo_id):
        reach()
    shipment, towers = make_shipments(folder, repo_id, branch=branch, license=license, verify=verify)
    if towers is not None:
        _plan(towers, _as_private(target, repo_id))  # its problems are found before the bundle is sent
    pushed = _publish(shipment, target)
    if towers is None:
        return pushed
    try:
        beside = dataclasses.replace(target, private=pushed.private)
        return dataclasses.replace(pushed, text_tower=_publish(towers, beside))
    except HubError as error:
        raise HubError(f"the bundle is pushed ({pushed.url}), but not its text tower: {error}") from error


def push_command(folder: str | Path, repo_id: str, *, branch: str, private: bool, license: str | None) -> str:
    """The command that pushes as `push` does, for messages."""
    options = ["--branch", branch]
    if private:
        options.append("--private")
    if license:
        options += ["--license", license]
    return shlex.join(["vitreg", "push", str(folder), repo_id, *options])


def plan(
    folder: str | Path, repo_id: str, *, license: str | None = None, verify: Verify = doors.verify, **where: Any
) -> PushPlan:
    """Do all that `push` does before it writes anything, and say what it would send.

    It needs no token, and cannot say whether the Hub would accept the files. Arguments and errors are those of `push`.
    """
    _require_repo_id(repo_id)
    target = Target(**where)
    with hub_errors(repo_id):
        reach()
    shipment, towers = make_shipments(folder, repo_id, branch=target.branch, license=license, verify=verify)
    planned = _plan(shipment, target)
    if towers is None:
        return planned
    return dataclasses.replace(planned, text_tower=_plan(towers, _as_private(target, repo_id)))


def pull(name: str, folder: str | Path) -> Path:
    """Fetch a bundle, with the figures and the recipe beside it, into a new folder that is complete or not there.

    Args:
        name: ``[hf-hub:]org/name[@revision]``.
        folder: Must not exist.

    Raises:
        BundleError: The repository is no bundle, or the folder exists or cannot be written.
        HubError: No such repository or revision, no permission, no network, no room, or lasting damage.
    """
    target = Path(folder)
    require_absent(target)
    cached = download(name)
    ModelBundle.load(cached)
    files = [cached / file for file in (*BUNDLE_FILES, *EXTRA_FILES) if (cached / file).exists()]
    require_space(target, sum(file.stat().st_size for file in files), what=name)
    with new_folder(target) as staging:
        for file in files:
            shutil.copyfile(file, staging / file.name)
    return target


def _as_private(target: Target, repo_id: str) -> Target:
    """The target of the repository beside another one: private if that one is."""
    with hub_errors(repo_id):
        found = look(hf.HfApi(library_name="vitreg_hub"), repo_id, target)
    return dataclasses.replace(target, private=target.private or (found is not None and found.tree.private))


def _plan(shipment: Shipment, target: Target) -> PushPlan:
    with hub_errors(shipment.repo_id):
        found = look(hf.HfApi(library_name="vitreg_hub"), shipment.repo_id, target)
        files, changed = compare(shipment, target, found)
    there = found.tree.checksums if found is not None else {}
    return PushPlan(
        repo_id=shipment.repo_id,
        branch=target.branch,
        makes_repository=found is None,
        makes_branch=target.branch not in (found.refs.branches if found is not None else ("main",)),
        license=shipment.license,
        files=tuple(
            _planned(name, content, there=there, changed=name in changed)
            for name, content in sorted(files.items())
            if content is not None or name in there
        ),
        left_out=shipment.left_out,
    )


def _planned(name: str, content: Path | bytes | None, *, there: Collection[str], changed: bool) -> PlannedFile:
    if content is None:
        return PlannedFile(name=name, size=0, state="deleted")
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    state = ("changed" if name in there else "new") if changed else "unchanged"
    return PlannedFile(name=name, size=size, state=state)


def _publish(shipment: Shipment, target: Target) -> Pushed:
    """Make a repository hold a shipment."""
    api, repo_id = hf.HfApi(library_name="vitreg_hub"), shipment.repo_id
    with hub_errors(repo_id):
        found = look(api, repo_id, target)
        if found is None:
            private = target.private or None  # None: the organisation's default
            patiently(partial(api.create_repo, repo_id, private=private, exist_ok=True))
            found = look(api, repo_id, target)
            if found is None:
                raise HubError(f"{repo_id} was made but cannot be read: use a token that may also read it.")
        _, files = compare(shipment, target, found)
        if target.branch not in found.refs.branches:
            start = found.tree.commit
            patiently(partial(api.create_branch, repo_id, branch=target.branch, revision=start, exist_ok=True))
        commit, request = found.tree.commit, None
        how: dict[str, Any] = dict(branch=target.branch, parent=found.tree, message=shipment.title)
        if files and target.create_pr:
            info = open_pull_request(api, repo_id, files, **how)
            commit, request = info.oid, info.pr_url
        elif files:
            commit = commit_files(api, repo_id, files, **how)
        url = f"{api.endpoint}/{repo_id}/commit/{commit}"
        if target.tag:
            _tag(api, repo_id, target.tag, commit, url)
    return Pushed(
        repo_id=repo_id,
        commit=commit,
        url=url,
        private=found.tree.private,
        pull_request=request,
        sent=tuple(sorted(name for name, content in files.items() if content is not None)),
        deleted=tuple(sorted(name for name, content in files.items() if content is None)),
    )


def _tag(api: hf.HfApi, repo_id: str, tag: str, commit: str, url: str) -> None:
    try:
        with hub_errors(repo_id):
            set_tag(api, repo_id, tag, commit)
    except HubError as error:
        raise HubError(
            f"the commit is there ({url}), but not the tag {tag}; run the same push again to set it: {error}"
        ) from error
