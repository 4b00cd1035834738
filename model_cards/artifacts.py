"""Measured artifacts of a bundle's model: kept in the bundle, drawn beside it, described in its card."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitreg_hub.analysis.figures.norms import norms_by_block_figure
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import verdict
from vitreg_hub.bundle.config import config_text, read_config
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import ArtifactSummary, provenance_to_json
from vitreg_hub.environment import without_folders
from vitreg_hub.files import ARTIFACTS_FIGURE, CARD_FILE, CONFIG_FILE, EXTRA_FILES, read_content, replace_files
from vitreg_hub.model_cards.card import decoded, encoded, render, update
from vitreg_hub.model_cards.marked import blocks_in
from vitreg_hub.plotting import png

BLOCKS = {"artifacts": "artifacts", "doors": "results"}
"""The block of a card that describes a field of provenance."""


def record(folder: str | Path, report: ArtifactReport, *, card: bool = True) -> bool:
    """Keep a report in a bundle's folder, draw it, and describe it in the card. The weights stay as they are.

    If there is no card, one is written; otherwise this package's blocks are updated, and the author's text stays. All
    files change, or none.

    Returns:
        Whether the card describes it.

    Raises:
        BundleError: The folder holds no bundle, or cannot be written to.
    """
    drawn = {ARTIFACTS_FIGURE: figure(report, name=read_config(Path(folder), called=str(folder))["vitreg"]["arch"])}
    return _keep(Path(folder), files=drawn, card=card, artifacts=summary(report))


def record_doors(folder: str | Path, differences: Mapping[str, float], *, card: bool = True) -> bool:
    """Keep what `doors.verify` found in a bundle's folder, like `record`."""
    return _keep(Path(folder), files={}, card=card, doors=differences)


def _keep(folder: Path, *, files: Mapping[str, bytes], card: bool, **measured: Any) -> bool:
    """Put fields into a bundle's provenance, write files beside it, and describe both in its card."""
    config, bundle = read_config(folder, called=str(folder)), ModelBundle.load(folder)
    bundle = dataclasses.replace(bundle, provenance=dataclasses.replace(bundle.provenance, **measured))
    config["vitreg"]["provenance"] = provenance_to_json(bundle.provenance)
    files = {**files, CONFIG_FILE: config_text(config).encode()}
    described = False
    if card:
        beside = [name for name in EXTRA_FILES if name in files or (folder / name).is_file()]
        old = read_content(folder / CARD_FILE)
        new = render(bundle, files=beside) if old is None else update(decoded(old), bundle, files=beside)
        described = all(BLOCKS[name] in blocks_in(new) for name in measured)
        files[CARD_FILE] = encoded(new)
    replace_files(folder, files)
    return described


def summary(report: ArtifactReport) -> ArtifactSummary:
    """The part of a report that a bundle keeps, without the machine's folders."""
    return ArtifactSummary(
        verdict=verdict(report),
        images=without_folders(report.images.name),
        num_images=report.images.num_images,
        image_size=report.images.size,
        block=report.block,
        outlier_fraction=report.outlier_fraction,
        cutoff=report.cutoff[report.block],
        attention=report.attention,
        notes=report.notes,
    )


def figure(report: ArtifactReport, *, name: str) -> bytes:
    """Norms of all tokens after every block, as a PNG file: the one figure that shows whether, where and how much.

    The model gets this name, instead of the path under which it was analysed.
    """
    return png(norms_by_block_figure([dataclasses.replace(report, model=dataclasses.replace(report.model, name=name))]))
