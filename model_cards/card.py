"""Model cards: what was measured or stands in the bundle, and nothing else."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.model_cards import description, reports
from vitreg_hub.model_cards.facts import one_line
from vitreg_hub.model_cards.marked import blocks_in, join, replace_blocks, require_whole
from vitreg_hub.model_cards.merging import front_matter, merge, record, recorded
from vitreg_hub.model_cards.metadata import metadata

PLACEHOLDER = "your-name/{arch}"
"""The repository in the card of a bundle that is not published yet; `push` replaces it."""

PUBLISHED = re.compile(r'create_model\("hf-hub:(?!your-name/)([\w.-]+/[\w.-]+)(?:@([^"]+))?"')
"""The repository and its branch in the block of usage."""

MAIN = "main"
BLOCKS = ("summary", "usage", "registers", "limits", "origin", "results", "artifacts", "environment", "citation")
"""The blocks of a card, in order; one with the metadata that this package wrote last follows them."""
METADATA = "metadata"


def render(
    bundle: ModelBundle,
    *,
    repo: str | None = None,
    files: Sequence[str] = (),
    revision: str | None = None,
    towers: bool | None = None,
) -> str:
    """A fresh card.

    Args:
        repo: ``org/name`` under which it is published; a placeholder by default.
        files: Names of the extra files beside the bundle, of which the card shows the figures.
        revision: Branch on which it is published; main by default.
        towers: Whether both towers of a CLIP model are published beside it; by default, whether the bundle says so.
    """
    data, blocks = _content(bundle, repo=repo, files=files, revision=revision, towers=towers)
    return f"{front_matter(data)}\n{join(blocks | {METADATA: record(data)})}"


def update(
    existing: str,
    bundle: ModelBundle,
    *,
    repo: str | None = None,
    revision: str | None = None,
    settled_license: bool = False,
    **more: Any,
) -> str:
    """An existing card with our blocks and metadata brought up to date, and every other character as it was.

    Blocks that the author deleted stay deleted, and a text without blocks is all the author's; if there is no text, the
    blocks are added. Metadata that cannot be read (the Hub refuses them too) or merged stay as they are.

    Args:
        repo: ``org/name`` under which it is published; by default the card's own, with its branch.
        settled_license: Whether the bundle's license holds even if the author has changed the card's.
        **more: Files and towers, as for `render`.

    Raises:
        BundleError: A block has lost one of its marks.
    """
    mark, text = ("\ufeff", existing[1:]) if existing.startswith("\ufeff") else ("", existing)
    if not REGEX_YAML_BLOCK.sub("", text, count=1).strip():
        text = _with_empty_blocks(text)
    require_whole(text)
    there = blocks_in(text)
    if not there:
        return existing
    published = PUBLISHED.search(there.get("usage", ""))
    if repo is None and published:
        repo, revision = published[1], revision or published[2]
    data, new = _content(bundle, repo=repo, revision=revision, **more)
    merged = merge(text, old=recorded(there.get(METADATA, "")), new=data, settled_license=settled_license)
    if merged is None:
        return mark + replace_blocks(text, new)
    return mark + replace_blocks(merged, new | {METADATA: record(data)})


def decoded(content: bytes) -> str:
    """The text of a card's file, with its own line ends; `encoded` returns the same bytes, whatever they are."""
    return content.decode("utf-8", "surrogateescape")


def encoded(card: str) -> bytes:
    """The content of a card's file."""
    return card.encode("utf-8", "surrogateescape")


def with_doors(bundle: ModelBundle, differences: Mapping[str, float] | None) -> ModelBundle:
    """A bundle with what `doors.verify` found, for its card."""
    return replace(bundle, provenance=replace(bundle.provenance, doors=differences))


def _with_empty_blocks(text: str) -> str:
    """A card that has nothing but metadata, if any, with empty blocks."""
    body = join(dict.fromkeys((*BLOCKS, METADATA), ""))
    line_end = "\r\n" if "\r\n" in text else "\n"
    head = text.strip()
    return (f"{head}{line_end}{line_end}" if head else "") + body.replace("\n", line_end)


def _content(
    bundle: ModelBundle,
    *,
    repo: str | None,
    revision: str | None,
    files: Sequence[str] = (),
    towers: bool | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata and the blocks; no text of the bundle can leave its line."""
    told, names = one_line(bundle.provenance), one_line(bundle.label_names)
    bundle = replace(bundle, provenance=told, label_names=names)
    repo, revision = repo or PLACEHOLDER.format(arch=bundle.arch), None if revision == MAIN else revision
    usage = description.usage(bundle, repo=repo, revision=revision, towers=towers)
    return metadata(bundle, repo, revision=revision), blocks_of(bundle, title=repo, usage=usage, files=files)


def blocks_of(bundle: ModelBundle, *, title: str, usage: str, files: Sequence[str], folder: str = "") -> dict[str, str]:
    """The text of every block, in order; `folder` is where the extra files are, as seen from the card."""
    texts = (
        description.summary(bundle, title=title.rpartition("/")[2]),
        usage,
        description.registers(bundle),
        description.limits(bundle),
        reports.origin(bundle, files=files, folder=folder),
        reports.results(bundle),
        reports.artifacts(bundle, files=files, folder=folder),
        reports.environment(bundle),
        description.CITATION,
    )
    return dict(zip(BLOCKS, texts, strict=True))
