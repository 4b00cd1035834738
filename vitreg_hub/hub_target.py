"""Where a push goes: what is in that place, whether it takes what was asked for, and what it lacks of a shipment."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import huggingface_hub as hf

from vitreg_hub import licenses
from vitreg_hub.errors import HubError, LicenseError
from vitreg_hub.hub_access import CARD_FILE
from vitreg_hub.hub_commit import Files, Refs, Tree, read_refs, read_tree
from vitreg_hub.hub_download import fetch_file
from vitreg_hub.hub_shipment import Shipment
from vitreg_hub.model_cards.card import decoded, encoded

logger = logging.getLogger(__name__)

REF_NAME = re.compile(r"(?!refs/|[-/.])(?!.*(\.\.|//|@\{|/\.))[^\s~^:?*\[\\]+(?<![./])(?<!\.lock)")
"""Names of branches and tags. Source: git check-ref-format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a push goes, as it was asked for."""

    branch: str
    private: bool = False
    create_pr: bool = False
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse names that Git has not, and contradictions.

        Raises:
            HubError: With what to do.
        """
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not REF_NAME.fullmatch(name):
                raise HubError(f"{name!r} is no name of a {kind}: take letters, digits, '-', '_', '.' and '/'.")
        if self.tag is not None and self.tag in ("main", self.branch):
            raise HubError(f"{self.tag} is a branch, and a tag of that name would hide it: choose another tag.")
        if self.create_pr and self.tag:
            raise HubError("a pull request is no commit of a branch yet: leave --tag out, or --create-pr.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What is in a target's place: nothing, or a branch, or the one that a new branch will start from."""

    refs: Refs | None = None
    tree: Tree | None = None

    def changes(self, files: Files) -> Files:
        """The files that have to be sent or deleted."""
        if self.tree is None:
            return {name: content for name, content in files.items() if content is not None}
        return self.tree.changed(files)


def look(api: hf.HfApi, repo_id: str, target: Target) -> Found:
    """Read what is there.

    Raises:
        HubError: It cannot become what was asked for.
    """
    refs = read_refs(api, repo_id)
    if refs is None:
        if target.create_pr:
            raise HubError(f"there is no repository {repo_id} that takes a pull request: leave --create-pr out.")
        return Found()
    if target.branch in refs.tags:
        raise HubError(f"{target.branch} is a tag of {repo_id}, which takes no commits: choose another branch.")
    if target.create_pr and target.branch not in refs.branches:
        raise HubError(f"{repo_id} has no branch {target.branch} for a pull request: choose one that is there.")
    if target.tag in refs.branches:
        raise HubError(f"{repo_id} has a branch {target.tag}, which a tag of that name would hide: choose another tag.")
    start = refs.branches.get(target.branch) or refs.branches.get("main")
    if start is None:
        raise HubError(f"{repo_id} has no branch main to start {target.branch} from: push to one that is there.")
    tree = read_tree(api, repo_id, start)
    if target.private and not tree.private:
        raise HubError(f"{repo_id} is public already: make it private on the Hub first, or leave --private out.")
    return Found(refs=refs, tree=tree)


def compare(shipment: Shipment, target: Target, found: Found) -> tuple[Files, Files]:
    """All files of a shipment, and those of them that have to be sent or deleted.

    Raises:
        HubError: The tag is taken.
        LicenseError: The card on the Hub tells another license.
    """
    files = _with_card(shipment, found)
    changed = found.changes(files)
    _refuse_tag(shipment, target, found, moves=bool(changed))
    return files, changed


def _with_card(shipment: Shipment, found: Found) -> Files:
    """All files of a shipment; the card is the one on the Hub, brought up to date."""
    if found.tree is None or CARD_FILE not in found.tree.checksums:
        return {**shipment.files, CARD_FILE: encoded(shipment.card(None))}
    told = found.tree.checksums[CARD_FILE]
    file = fetch_file(shipment.repo_id, CARD_FILE, found.tree.commit, told=told)
    existing = decoded(file.read_bytes())
    card = shipment.card(existing)
    _require_license(shipment, licenses.told_by({}, file), kept=card == existing)
    if shipment.has_card and shipment.card(None) != card:
        logger.warning("%s keeps its card: the author's text in the folder's %s differs.", shipment.repo_id, CARD_FILE)
    return {**shipment.files, CARD_FILE: encoded(card)}


def _require_license(shipment: Shipment, told: Sequence[str], *, kept: bool) -> None:
    """Refuse to publish weights under a card that tells another license than theirs.

    Args:
        shipment: Its license is settled, without a look at the card on the Hub.
        told: By that card.
        kept: Whether that card stays as it is.
    """
    repo_id, ours = shipment.repo_id, shipment.license
    if not told or list(told) == [ours]:
        return
    known = [*told, *filter(None, [ours])]
    settled = licenses.settle(known, shipment.given_license, called=f"the card of {repo_id} and the bundle")
    if settled != ours:
        raise LicenseError(f"the card of {repo_id} tells the license {settled}: push with --license {settled}.")
    if kept:
        raise LicenseError(
            f"the card of {repo_id} is its author's and tells the license {told[0]}, not {ours}: change it on the Hub."
        )


def _refuse_tag(shipment: Shipment, target: Target, found: Found, *, moves: bool) -> None:
    taken = found.refs.tags.get(target.tag) if found.refs is not None and target.tag else None
    if taken is not None and (moves or taken != found.tree.commit):
        raise HubError(f"{shipment.repo_id} has a tag {target.tag} already: choose another one.")
