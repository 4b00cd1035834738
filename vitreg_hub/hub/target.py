"""Where a push goes: what is in that place, whether it takes what was asked for, and what it lacks of a shipment."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import huggingface_hub as hf
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from vitreg_hub import licenses
from vitreg_hub.errors import HubRefusedError, LicenseError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE
from vitreg_hub.hub.shipment import Shipment
from vitreg_hub.model_cards.card import decoded, encoded
from vitreg_hub.model_cards.marked import blocks_in, replace_blocks
from vitreg_hub.remote.commit import Files, Refs, Tree, read_refs, read_tree
from vitreg_hub.remote.download import fetch_file

logger = logging.getLogger(__name__)

REF_NAME = re.compile(r"(?!HEAD$|refs/|[-/.])(?!.{200})(?!.*(\.\.|//|@\{|/\.))[^\s~^:?*\[\\]+(?<![./])(?<!\.lock)")
"""Names of branches and tags, which become names of files. Source: git check-ref-format."""
OF_OTHERS = re.compile(
    r"(pre)?processor_config\.json|(pytorch_model|tf_model|flax_model|open_clip_|model-).*\.\w+|model\.[\w.]+\.json"
)
"""Files from which transformers, timm or open_clip would make something else than what is published beside them."""


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
            HubRefusedError: With what to do.
        """
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not REF_NAME.fullmatch(name):
                raise HubRefusedError(f"{name!r} is no name of a {kind}: take letters, digits, '-', '_', '.' and '/'.")
        if self.tag is not None and self.tag in ("main", self.branch):
            raise HubRefusedError(f"{self.tag} is a branch, and a tag of that name would hide it: choose another tag.")
        if self.create_pr and self.tag:
            raise HubRefusedError("a pull request is no commit of a branch yet: leave --tag out, or --create-pr.")


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
        HubRefusedError: It cannot become what was asked for.
    """
    refs = read_refs(api, repo_id)
    if refs is None:
        if target.create_pr:
            raise HubRefusedError(f"there is no repository {repo_id} that takes a pull request: leave --create-pr out.")
        return Found()
    if target.branch in refs.tags:
        raise HubRefusedError(f"{target.branch} is a tag of {repo_id}, which takes no commits: choose another branch.")
    if target.create_pr and target.branch not in refs.branches:
        raise HubRefusedError(f"{repo_id} has no branch {target.branch} for a pull request: choose one that is there.")
    if target.tag in refs.branches:
        raise HubRefusedError(
            f"{repo_id} has a branch {target.tag}, which a tag of that name would hide: choose another tag."
        )
    start = refs.branches.get(target.branch) or refs.branches.get("main")
    if start is None:
        raise HubRefusedError(f"{repo_id} has no branch main to start {target.branch} from: push to one that is there.")
    tree = read_tree(api, repo_id, start)
    if target.private and not tree.private:
        raise HubRefusedError(f"{repo_id} is public already: make it private on the Hub first, or push to another one.")
    return Found(refs=refs, tree=tree)


def compare(shipment: Shipment, target: Target, found: Found) -> tuple[Files, Files]:
    """All files of a shipment, and those of them that have to be sent or deleted.

    Raises:
        HubRefusedError: The tag is taken, or another model's files are there.
        LicenseError: The card on the Hub tells another license.
    """
    there = found.tree.checksums if found.tree is not None else {}
    others = sorted(name for name in there if name not in shipment.files and OF_OTHERS.fullmatch(name))
    if others:
        raise HubRefusedError(
            f"{shipment.repo_id} holds files of another model ({', '.join(others)}), which would be loaded with this "
            "one: delete them there first, or push to another repository."
        )
    files = _with_card(shipment, found)
    changed = found.changes(files)
    _refuse_tag(shipment, target, found, moves=bool(changed))
    if CONFIG_FILE in changed and CONFIG_FILE in there:
        _tell_of_strangers(shipment, found.tree)
    return files, changed


def _tell_of_strangers(shipment: Shipment, tree: Tree) -> None:
    """Say that a model which this package did not publish is replaced."""
    config = fetch_file(shipment.repo_id, CONFIG_FILE, tree.commit, told=tree.checksums[CONFIG_FILE])
    if b'"vitreg"' not in config.read_bytes():
        logger.warning("%s holds a model that is no bundle, of which only the history will be left.", shipment.repo_id)


def _with_card(shipment: Shipment, found: Found) -> Files:
    """All files of a shipment; the card is the one on the Hub, brought up to date."""
    if found.tree is None or CARD_FILE not in found.tree.checksums:
        return {**shipment.files, CARD_FILE: encoded(shipment.card(None))}
    told = found.tree.checksums[CARD_FILE]
    file = fetch_file(shipment.repo_id, CARD_FILE, found.tree.commit, told=told)
    existing = decoded(file.read_bytes())
    card = shipment.card(existing)
    _require_license(shipment, licenses.told_by({}, file), kept=card == existing)
    if shipment.own_card is not None and not _lines_of_author(shipment.own_card) <= _lines_of_author(card):
        logger.warning(
            "%s keeps the text of its card, and what the folder's %s says beside our blocks is not published: edit "
            "the card on the Hub.",
            *(shipment.repo_id, CARD_FILE),
        )
    if card == existing and not blocks_in(card):
        logger.warning(
            "the card of %s is its author's and stays as it is: see that it tells of these weights.", shipment.repo_id
        )
    return {**shipment.files, CARD_FILE: encoded(card)}


def _lines_of_author(card: str) -> set[str]:
    """What a card says outside of our blocks."""
    body = REGEX_YAML_BLOCK.sub("", card, count=1)
    own = replace_blocks(body, dict.fromkeys(blocks_in(body), ""))
    return {line.strip() for line in own.splitlines()}


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
        raise HubRefusedError(f"{shipment.repo_id} has a tag {target.tag} already: choose another one.")
