"""All figures of an analysis."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from vitreg_hub.analysis.figures.attention import attention_mass_figure
from vitreg_hub.analysis.figures.comparison import comparison_figure, in_training
from vitreg_hub.analysis.figures.maps import examples_figure
from vitreg_hub.analysis.figures.norms import (
    location_figure,
    norm_distribution_figure,
    norms_by_block_figure,
    outlier_share_figure,
    outliers_per_image_figure,
)
from vitreg_hub.analysis.figures.probes import global_information_figure, local_information_figure, redundancy_figure
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.content import ReportFigure
from vitreg_hub.plotting import png


def report_figures(reports: Sequence[ArtifactReport]) -> tuple[ReportFigure, ...]:
    """Draw everything that was measured of models, side by side; what has no data is left out."""
    named = [replace(r, model=replace(r.model, name=name)) for r, name in zip(reports, names(reports), strict=True)]
    drawn: list[ReportFigure] = []

    def add(section: str, name: str, caption: str, figure: Figure, of: str) -> None:
        alt = f"{figure.get_suptitle()}: {of}".replace(r"\$", "$")
        drawn.append(ReportFigure(section=section, name=name, alt=alt, caption=caption, png=png(figure)))

    for section, name, caption, draw, has_data in MEASURES:
        shown = [report for report in named if has_data(report)]
        if len(shown) > (draw is comparison_figure):
            along = "training steps" if in_training(shown) else "models, from the fewest parameters to the most"
            add(section, name, caption.format(along=along), draw(shown), ", ".join(names(shown)))
    for index, report in enumerate(named, start=1):
        if shown := report.examples:
            figure = examples_figure(shown, name=report.model.name)
            add("examples", f"examples_{index}", EXAMPLES, figure, f"{len(shown)} images")
    return tuple(drawn)


COMPARISON = (
    "Left: share of the patch tokens that are outliers. Middle: the median, a high quantile and the largest of their "
    "norms; where the largest leaves the median behind, outliers appear. Right: the blocks of each model, those with "
    "outliers filled. All over {along}."
)
NORMS_BY_BLOCK = (
    "Each column is a block, each shade of grey the share of its patch tokens that have this norm. Outliers are a "
    "second, higher band, above the cutoff. Lines: the median patch and the means of class token and registers."
)
NORM_DISTRIBUTION = (
    "How many patch tokens have which norm, both on logarithmic scales. Outliers, if there are any, form a hill of "
    "their own to the right of the dashed cutoff; the number says which share of all patch tokens they are."
)
OUTLIER_SHARE = "Share of the patch tokens after each block whose norm is above the cutoff of that block."
LOCATIONS = (
    "Each cell is a place in the grid of patches; the darker it is, the more images have an outlier there. An even "
    "shade means that outliers follow the image, stripes or single dark cells that they follow the grid."
)
OUTLIERS_PER_IMAGE = "How many images have how many outliers."
REDUNDANCY = (
    "How similar patches are to their neighbours before the first block; 1 means the same direction. If outliers lie "
    "further right than normal patches, the model makes outliers of patches that add nothing to their neighbours. "
    "Dotted lines are means."
)
LOCAL = (
    "Linear probes guess from one token where its patch is and what its pixels are. Black marks are what the best "
    "constant answer would reach. If outliers do worse than normal patches, they have given up what they knew."
)
GLOBAL = (
    "Logistic regression guesses the image's class from one token alone. If an outlier does better than a normal "
    "patch, it holds information about the whole image. The dashed line is the most frequent class."
)
ATTENTION = (
    "Where attention goes, as a mean over heads and images. The pale bar on top shows how many tokens are of each "
    "kind: attention that preferred none would look like it."
)
EXAMPLES = (
    "One line per image, or several: the input; norms of its patch tokens, with outliers outlined; the first three "
    "principal components of its tokens as red, green and blue; and what the class token and each register attend "
    "to. The numbers below a map are its darkest and its brightest value."
)


def _always(_: ArtifactReport) -> bool:
    return True


def _has_outliers(report: ArtifactReport) -> bool:
    return report.outlier_fraction[report.block] > 0


MEASURES: tuple[tuple[str, str, str, Callable[..., Figure], Callable[[ArtifactReport], Any]], ...] = (
    ("comparison", "comparison", COMPARISON, comparison_figure, _always),
    ("norms", "norms_by_block", NORMS_BY_BLOCK, norms_by_block_figure, _always),
    ("norms", "norm_distribution", NORM_DISTRIBUTION, norm_distribution_figure, _always),
    ("norms", "outlier_share", OUTLIER_SHARE, outlier_share_figure, lambda r: r.first_outlier_block is not None),
    ("places", "locations", LOCATIONS, location_figure, _has_outliers),
    ("places", "outliers_per_image", OUTLIERS_PER_IMAGE, outliers_per_image_figure, _has_outliers),
    ("redundancy", "redundancy", REDUNDANCY, redundancy_figure, lambda r: r.redundancy.normal or r.redundancy.outlier),
    (
        "local",
        "local_information",
        LOCAL,
        local_information_figure,
        lambda r: r.local_information.normal or r.local_information.outlier,
    ),
    ("global", "global_information", GLOBAL, global_information_figure, lambda r: r.global_information.tokens),
    ("attention", "attention_mass", ATTENTION, attention_mass_figure, lambda r: r.attention),
)
"""Section, name, caption, figure of several models, and which models have something to show in it."""
