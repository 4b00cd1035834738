"""What the figures of reports share: panels side by side, legends, and colour maps."""

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vitreg_hub.plotting import COLUMNS, plain


def panels(names: Sequence[str], *, title: str, height: float = 3.2, share: str = "both") -> tuple[Figure, list[Axes]]:
    """A figure with one panel per model, under its name.

    Panels have this height in inches, and share the limits of these axes: "x", "y", "both" or "none".
    """
    columns = min(len(names), COLUMNS)
    rows = math.ceil(len(names) / columns)
    size = ({1: 7.0, 2: 4.9, 3: 3.6}[columns] * columns, height * rows + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share in ("x", "both"), sharey=share in ("y", "both"))
    axes = list(grid.flat)
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(plain(name), fontsize=10)
        axis.tick_params(labelsize=8, labelbottom=True, labelleft=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(names)]


def legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend below all panels."""
    columns = min(len(handles), 3 if figure.get_figwidth() < 9 else 5)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def patch(colour: str, label: str) -> Patch:
    return Patch(color=colour, label=label)


def line(colour: str, label: str, style: Literal["-", "--", ":"] = "-") -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle=style, linewidth=1.8)


def colour_map(*colours: str) -> Colormap:
    """Colours that flow into each other; white where there is no value."""
    return LinearSegmentedColormap.from_list("", colours).with_extremes(bad="white", under="white")
