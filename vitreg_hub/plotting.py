"""What every figure of this package shares: colours, axes that stay readable, numbers, and the PNG."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

# Colours that colour-blind readers can distinguish. Source: Okabe and Ito, "Color Universal Design", 2008.
NORMAL, OUTLIER, CLASS, REGISTER, CHANCE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"

COLUMNS = 3
"""Most panels in a row."""

DPI = 144


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def plain(text: str) -> str:
    """Text in which a dollar sign does not start a formula."""
    return text.replace("$", r"\$")


def percent_axis(axis: Axis) -> None:
    """Label shares in [0, 1] as percentages."""
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g} %"))


def whole_numbers(axis: Axis, most: int = 9) -> None:
    """Ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def log_axis(axis: Axis, low: float, high: float) -> None:
    """Plain numbers as ticks on a logarithmic axis whose limits are known."""
    locator: Locator = LogLocator() if high / low > 1000 else LogLocator(subs=(1, 2, 5))
    axis.set_major_locator(MaxNLocator(6) if high / low < 10 else locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def positive_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis that holds all positive values."""
    found = np.array([value for value in values if value > 0 and math.isfinite(value)] or [1.0])
    return found.min() / 1.15, found.max() * 1.15


def number(value: float | None) -> str:
    """Three digits; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
