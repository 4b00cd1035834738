"""Where a push goes: what is there, whether it accepts the push, and which files it still needs."""

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
"""Names of branches and tags (git check-ref-format), which become names of files."""
OF_OTHERS = re.compile(
    r"(pre)?processor_config\.json|(pytorch_model|tf_model|flax_model|open_clip_|model-).*\.\w+|model\.[\w.]+\.json"
)
"""Files from which transformers, timm or open_clip would load something else than what is published beside them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where the user wants a push to go."""

    branch: str = "main"
    private: bool = False
    create_pr: bool = False
    tag: str | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions and names that Git does not allow."""
        for kind, name in (("branch", self.branch), ("tag", self.tag)):
            if name is not None and not REF_NAME.fullmatch(name):
                raise HubRefusedError(
                    f"{name!r} is not a valid {kind} name: use letters, digits, '-', '_', '.' and '/'."
                )
        if self.tag is not None and self.tag in ("main", self.branch):
            raise HubRefusedError(f"{self.tag} is a branch, and a tag of that name would hide it: choose another tag.")
        if self.create_pr and self.tag:
            raise HubRefusedError("a pull request is no commit of a branch yet: leave --tag out, or --create-pr.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What is there: the branch, or the branch that a new one will start from."""

    refs: Refs
    tree: Tree


def look(api: hf.HfApi, repo_id: str, target: Target) -> Found | None:
    """Read what is there; None if there is no repository.

    Raises:
        HubRefusedError: The repository does not accept the push.
    """
    refs = read_refs(api, repo_id)
    if refs is None:
        if target.create_pr:
            raise HubRefusedError(f"there is no repository {repo_id} to open a pull request in: leave --create-pr out.")
        return None
    if target.branch in refs.tags:
        raise HubRefusedError(
            f"{target.branch} is a tag of {repo_id}, which accepts no commits: choose another branch."
        )
    if target.create_pr and target.branch not in refs.branches:
        raise HubRefusedError(f"{repo_id} has no branch {target.branch} for a pull request: choose one that exists.")
    if target.tag in refs.branches:
        raise HubRefusedError(
            f"{repo_id} has a branch {target.tag}, which a tag of that name would hide: choose another tag."
        )
    start = refs.branches.get(target.branch) or refs.branches.get("main")
    if start is None:
        raise HubRefusedError(
            f"{repo_id} has no branch main to start {target.branch} from: push to a branch that exists."
        )
    tree = read_tree(api, repo_id, start)
    if target.private and not tree.private:
        raise HubRefusedError(f"{repo_id} is public already: make it private on the Hub first, or push to another one.")
    return Found(refs=refs, tree=tree)


def compare(shipment: Shipment, target: Target, found: Found | None) -> tuple[Files, Files]:
    """All files of a shipment, and those of them that have to be sent or deleted.

    Raises:
        HubRefusedError: The tag is taken, or another model's files are there.
        LicenseError: The card on the Hub states another license.
    """
    there = found.tree.checksums if found is not None else {}
    others = sorted(name for name in there if name not in shipment.files and OF_OTHERS.fullmatch(name))
    if others:
        raise HubRefusedError(
            f"{shipment.repo_id} holds files of another model ({', '.join(others)}), which would be loaded with this "
            "one: delete them there first, or push to another repository."
        )
    files = _with_card(shipment, found)
    if found is None:
        return files, {name: content for name, content in files.items() if content is not None}
    changed = found.tree.changed(files)
    _refuse_tag(shipment, target, found, moves=bool(changed))
    if CONFIG_FILE in changed and CONFIG_FILE in there:
        _warn_of_other_model(shipment, found.tree)
    return files, changed


def _warn_of_other_model(shipment: Shipment, tree: Tree) -> None:
    """Warn before a model that this package did not publish is replaced."""
    config = fetch_file(shipment.repo_id, CONFIG_FILE, tree.commit, expected=tree.checksums[CONFIG_FILE])
    if b'"vitreg"' not in config.read_bytes():
        logger.warning(
            "%s holds a model that is not a bundle: it will be replaced, and remain in the history only.",
            shipment.repo_id,
        )


def _with_card(shipment: Shipment, found: Found | None) -> Files:
    """All files of a shipment; the card is the one on the Hub, brought up to date."""
    if found is None or CARD_FILE not in found.tree.checksums:
        return {**shipment.files, CARD_FILE: encoded(shipment.card(None))}
    expected = found.tree.checksums[CARD_FILE]
    file = fetch_file(shipment.repo_id, CARD_FILE, found.tree.commit, expected=expected)
    existing = decoded(file.read_bytes())
    card = shipment.card(existing)
    _require_license(shipment, licenses.stated_licenses({}, file), kept=card == existing)
    if shipment.own_card is not None and not _lines_of_author(shipment.own_card) <= _lines_of_author(card):
        logger.warning(
            "%s keeps the text of its card, and what the folder's %s says outside our blocks is not published: edit "
            "the card on the Hub.",
            shipment.repo_id,
            CARD_FILE,
        )
    if card == existing and not blocks_in(card):
        logger.warning(
            "the card of %s is its author's and stays as it is: check that it describes these weights.",
            shipment.repo_id,
        )
    return {**shipment.files, CARD_FILE: encoded(card)}


def _lines_of_author(card: str) -> set[str]:
    """The lines of a card outside our blocks."""
    body = REGEX_YAML_BLOCK.sub("", card, count=1)
    own = replace_blocks(body, dict.fromkeys(blocks_in(body), ""))
    return {line.strip() for line in own.splitlines()}


def _require_license(shipment: Shipment, stated: Sequence[str], *, kept: bool) -> None:
    """Refuse to publish weights under a card on the Hub, kept or updated, that states another license than theirs."""
    repo_id, ours = shipment.repo_id, shipment.license
    if not stated or list(stated) == [ours]:
        return
    known = [*stated, ours] if ours else stated
    settled = licenses.settle(known, shipment.given_license, called=f"the card of {repo_id} and the bundle")
    if settled != ours:
        raise LicenseError(f"the card of {repo_id} states the license {settled}: push with --license {settled}.")
    if kept:
        raise LicenseError(
            f"the card of {repo_id} is its author's and states the license {stated[0]}, not {ours}: change it there."
        )


def _refuse_tag(shipment: Shipment, target: Target, found: Found, *, moves: bool) -> None:
    taken = found.refs.tags.get(target.tag) if target.tag else None
    if taken is not None and (moves or taken != found.tree.commit):
        raise HubRefusedError(f"{shipment.repo_id} has a tag {target.tag} already: choose another one.")
