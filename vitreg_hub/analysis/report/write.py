"""What an analysis writes: report.json, one PNG per figure, and a page that holds everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from PIL import Image
from torch import nn

from vitreg_hub.analysis.engine import Options
from vitreg_hub.analysis.figures.maps import attention_figure
from vitreg_hub.analysis.figures.report import report_figures
from vitreg_hub.analysis.measures import token_examples
from vitreg_hub.analysis.report.page import render
from vitreg_hub.analysis.results import ArtifactReport, to_json
from vitreg_hub.errors import DataError
from vitreg_hub.files import new_folder, require_absent, whole_file
from vitreg_hub.images.pictures import BROKEN, read_rgb
from vitreg_hub.pages.content import REPORT_JSON, REPORT_PAGE
from vitreg_hub.plotting import png


def write_report(reports: Sequence[ArtifactReport], out: str | Path) -> Path:
    """Write the reports of one or more models, side by side, to a new folder, which appears whole or not at all.

    Args:
        reports: In the order in which the models stand side by side.
        out: Must not exist. Gets `report.json`, `report.html`, which needs no other file, and a PNG per figure.

    Raises:
        BundleError: The folder exists or cannot be written.
    """
    figures = report_figures(reports)
    with new_folder(Path(out)) as staging:
        (staging / REPORT_JSON).write_text(to_json(reports), encoding="utf-8")
        (staging / REPORT_PAGE).write_text(render(reports, figures), encoding="utf-8")
        for figure in figures:
            (staging / f"{figure.name}.png").write_bytes(figure.png)
    return Path(out)


def draw_attention(
    model: nn.Module | str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    heads: bool = False,
    **options: Unpack[Options],
) -> Path:
    """Draw what the class token and each register attend to in images, as in the figures of the paper.

    Args:
        model: A ViT as a module or by name.
        images: Image files, one row each.
        out: PNG to write; must not exist.
        heads: Draw every head, not their mean.
        **options: See `Options`; `block` is the block whose attention is drawn, the last by default.

    Raises:
        DataError: A file is not an image, `out` is not a PNG, or the model has neither class token nor registers.
        BundleError: `out` exists or cannot be written.
    """
    if Path(out).suffix.lower() != ".png":
        raise DataError(f"{out} does not end in .png: the figure is a PNG, so give a name that does.")
    require_absent(Path(out))
    pictures = [_opened(file) for file in images]
    examples = token_examples(model, pictures, number=len(pictures), **options)
    figure = attention_figure(examples, heads=heads)
    with whole_file(Path(out)) as file:
        file.write_bytes(png(figure))
    return Path(out)


def _opened(file: str | Path) -> Image.Image:
    try:
        return read_rgb(file)
    except BROKEN as error:
        raise DataError(f"{file} cannot be read as an image: {error}.") from error
