"""Model cards: what was measured or is written in the bundle, and nothing else."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.model_cards import description, reports
from vitreg_hub.model_cards.marked import blocks_in, join, replace_blocks
from vitreg_hub.model_cards.merging import front_matter, merge, record, recorded
from vitreg_hub.model_cards.metadata import metadata

PLACEHOLDER = "your-name/{arch}"
"""Repository in the card of a bundle that is not published yet; `push` puts the real one in its place."""

PUBLISHED = re.compile(r'create_model\("hf-hub:(?!your-name/)([\w.-]+/[\w.-]+)"')
"""Where a card tells its repository."""

METADATA = "metadata"
"""Block with the metadata that this package wrote last."""


def render(bundle: ModelBundle, *, repo: str | None = None, files: Sequence[str] = ()) -> str:
    """A fresh card.

    Args:
        bundle: The model.
        repo: ``org/name`` under which it is published; a placeholder by default.
        files: Names of the extra files beside the bundle; figures are shown if they are there.
    """
    repo = repo or PLACEHOLDER.format(arch=bundle.arch)
    data = metadata(bundle, repo)
    blocks = _blocks(bundle, repo=repo, files=files) | {METADATA: record(data)}
    return f"{front_matter(data)}\n{join(blocks)}"


def update(existing: str, bundle: ModelBundle, *, repo: str | None = None, files: Sequence[str] = ()) -> str:
    """A card that is there, with our blocks and our metadata brought up to date, and every other character as it was.

    A block that the author has deleted stays so, and a card without any block is all the author's. Metadata that cannot
    be read (the Hub refuses them too) or merged are left as they are.

    Args:
        existing: The card.
        bundle: The model.
        repo: ``org/name`` under which it is published; the one that the card tells by default.
        files: Names of the extra files beside the bundle.
    """
    there = blocks_in(existing)
    if not there:
        return existing
    published = PUBLISHED.search(existing)
    repo = repo or (published[1] if published else PLACEHOLDER.format(arch=bundle.arch))
    mark, text = ("\ufeff", existing[1:]) if existing.startswith("\ufeff") else ("", existing)
    data = metadata(bundle, repo)
    new = _blocks(bundle, repo=repo, files=files)
    merged = merge(text, old=recorded(there.get(METADATA, "")), new=data)
    if merged is None:
        return mark + replace_blocks(text, new)
    return mark + replace_blocks(merged, new | {METADATA: record(data)})


def tells(card: str, block: str) -> bool:
    """Whether a card has a block of ours."""
    return block in blocks_in(card)


def decoded(content: bytes) -> str:
    """The text of a card's file, with its own line ends; `encoded` gives the same bytes back, whatever they are."""
    return content.decode("utf-8", "surrogateescape")


def encoded(card: str) -> bytes:
    """What a card's file holds."""
    return card.encode("utf-8", "surrogateescape")


def with_doors(bundle: ModelBundle, differences: Mapping[str, float]) -> ModelBundle:
    """A bundle whose card tells what `doors.verify` found of it."""
    settings = {**bundle.provenance.settings, reports.DOORS: dict(differences)}
    return replace(bundle, provenance=replace(bundle.provenance, settings=settings))


def _blocks(bundle: ModelBundle, *, repo: str, files: Sequence[str]) -> dict[str, str]:
    """The text of every block, in order."""
    return {
        "summary": description.summary(bundle, title=repo.rpartition("/")[2]),
        "usage": description.usage(bundle, repo=repo),
        "registers": description.registers(bundle),
        "limits": description.limits(bundle),
        "origin": reports.origin(bundle, files=files),
        "results": reports.results(bundle),
        "artifacts": reports.artifacts(bundle, files=files),
        "environment": reports.environment(bundle),
        "citation": description.CITATION,
    }
