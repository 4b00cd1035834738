"""The measured artifacts of a bundle's model: kept in the bundle, told by its card."""

import dataclasses
from pathlib import Path
from typing import Any

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import verdict
from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import config_text, read_config, write_file
from vitreg_hub.hub_access import CARD_FILE, CONFIG_FILE
from vitreg_hub.model_cards.card import render

ENTRY = "artifacts"
"""Where a bundle's provenance keeps them, under `settings`."""


def record(folder: str | Path, report: ArtifactReport) -> bool:
    """Keep a report in a bundle on the disk, and tell it in its card. The weights stay as they are.

    The card is written where there is none or where it is still the one that this package wrote; an author's own text
    is not touched.

    Args:
        folder: A bundle's folder.
        report: Of this bundle's model.

    Returns:
        Whether the card tells it.

    Raises:
        BundleError: The folder holds no bundle, or cannot be written to.
    """
    folder = Path(folder)
    config, bundle = read_config(folder, called=str(folder)), ModelBundle.load(folder)
    own = folder / CARD_FILE
    ours = not own.exists() or own.read_text() == render(bundle)
    settings = config["vitreg"]["provenance"].setdefault("settings", {})
    settings[ENTRY] = summary(report)
    text = config_text(config)
    write_file(folder / CONFIG_FILE, lambda file: file.write_text(text, encoding="utf-8"), replace=True)
    if ours:
        card = render(ModelBundle.load(folder))
        write_file(own, lambda file: file.write_text(card, encoding="utf-8"), replace=True)
    return ours


def summary(report: ArtifactReport) -> dict[str, Any]:
    """What a bundle keeps of a report. Of a folder of images it keeps the name, not the whole path."""
    images = report.images.name
    return {
        "verdict": verdict(report),
        "images": Path(images).name if Path(images).is_dir() else images,
        "num_images": report.images.num_images,
        "image_size": list(report.images.size),
        "block": report.block,
        "outlier_fraction": list(report.outlier_fraction),
        "cutoff": report.cutoff[report.block],
        "attention": [dataclasses.asdict(mass) for mass in report.attention],
        "notes": list(report.notes),
    }
