"""Figures of single images: what the model's tokens look like, and what it attends to."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from vitreg_hub.analysis.examples import Example
from vitreg_hub.analysis.figures.attention import attention_maps_of
from vitreg_hub.analysis.figures.maps import Map, draw_maps
from vitreg_hub.plotting import plain


def examples_figure(examples: Sequence[Example], *, name: str) -> Figure:
    """Draw, per image, the input, patch norms with outliers outlined, principal components, and attention maps.

    Norms have one colour scale for all images, attention maps one each. Attention is the mean over heads.

    Args:
        examples: One per image.
        name: Of the model.

    Source: Darcet et al., "Vision Transformers Need Registers", ICLR 2024, figures 1 and 9.
    """
    limits = (min(e.norms.min() for e in examples), max(e.norms.max() for e in examples))
    return draw_maps([[_maps(example, limits)] for example in examples], title=plain(f"Single images: {name}"))


def _maps(example: Example, limits: tuple[float, float]) -> list[Map]:
    return [
        Map(title="input", values=example.image),
        Map(title="patch norms", values=example.norms, outlined=example.outliers, limits=limits),
        Map(title="components", values=example.components),
        *attention_maps_of(example),
    ]
