"""A figure of how a run went: losses, scores and artifacts over its steps, as far as they were logged."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vitreg_hub import typed
from vitreg_hub.errors import VitregError
from vitreg_hub.files import whole_file
from vitreg_hub.plotting import (
    CLASS,
    COLUMNS,
    NORMAL,
    OUTLIER,
    REGISTER,
    log_axis,
    percent_axis,
    plain,
    png,
    positive_limits,
    whole_numbers,
)

NO_TERMS = {
    *("loss", "lr", "weight_decay", "grad_norm", "unreadable_images", "logit_scale"),
    *("images_per_second", "data_wait", "eta_seconds", "memory_gib", "mfu"),
}
"""Logged numbers of a training step that are not terms of its loss."""
MOST_TERMS = 6
MOST_DOTS = 40
"""Most points of a curve that are marked one by one."""
GREY = "#888888"

Curve = Mapping[int, float]
"""Finite values by the number of steps done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Curves that share an axis.

    Attributes:
        colours: Of the curves, in their order; if there are more curves, a colour map is used instead.
    """

    title: str
    curves: Mapping[str, Curve]
    colours: Sequence[str] = ()
    log: bool = False
    share: bool = False
    mark: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The content of `metrics.jsonl`: curves by name, and the steps done when the best model so far was evaluated."""

    training: Mapping[str, Curve] = field(default_factory=dict)
    evaluation: Mapping[str, Curve] = field(default_factory=dict)
    best: int | None = None


def draw_curves(metrics: Path, file: Path, *, title: str) -> Path | None:
    """Draw a run by its `metrics.jsonl`, replacing an older PNG; returns that, or None if there is nothing to draw.

    Raises:
        BundleError: It cannot be written.
    """
    shown = [panel for panel in panels_of(read_history(metrics)) if panel.curves]
    if not shown:
        return None
    with whole_file(file, replace=True) as target:
        target.write_bytes(png(_figure(shown, title)))
    return file


def read_history(metrics: Path) -> History:
    """Read `metrics.jsonl` without numbers that are not finite and without damaged lines."""
    training: dict[str, dict[int, float]] = {}
    evaluation: dict[str, dict[int, float]] = {}
    best = None
    for text in metrics.read_bytes().splitlines(keepends=True) if metrics.is_file() else ():
        if (read := read_line(text)) is None:
            continue
        step, line = read
        best = step if line.pop("best", False) else best
        curves = training if "loss" in line else evaluation
        for name, value in line.items():
            if name != "time" and isinstance(value, int | float) and abs(value) <= sys.float_info.max:
                curves.setdefault(name, {})[step] = value
    return History(training=training, evaluation=evaluation, best=best)


def read_line(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """The step of a line of `metrics.jsonl`, and the rest; None if it is damaged, as by a kill while it was written."""
    try:
        values = typed.read(dict[str, Any], typed.parsed(line)) if line.endswith(b"\n") else {}
    except VitregError:
        return None
    step = values.pop("step", None)
    return (step, values) if type(step) is int else None


def panels_of(history: History) -> tuple[Panel, ...]:
    """The panels of the figure; some may be empty."""
    training, evaluation = history.training, history.evaluation
    terms = {name.removeprefix("loss_"): curve for name, curve in training.items() if name not in NO_TERMS}
    loss = _chosen(training, {"loss": "loss"})
    if len(terms) <= MOST_TERMS:
        loss |= terms
    scores = {
        name.removeprefix("eval/").replace("_", " ").replace("/", " "): curve
        for name, curve in evaluation.items()
        if name.startswith(("eval/", "raw/", "averaged/"))
    }
    shares = {int(block): curve for block, curve in _matching(evaluation, r"artifacts/block_(\d+)/outlier_fraction")}
    last = max(shares, default=0)
    block = f"artifacts/block_{last}/"
    outliers: dict[str, Curve] = {}
    if last:
        steps = sorted({step for curve in shares.values() for step in curve})
        most = {step: max(curve[step] for curve in shares.values() if step in curve) for step in steps}
        outliers["most of any block"] = most
    if shares:
        outliers[f"block {last}"] = shares[last]
    norms = {f"{block}norm_q100": "largest", f"{block}norm_q99": "99 % quantile", f"{block}norm_q50": "median"}
    registers = {f"register {number}": x for number, x in _matching(evaluation, rf"{block}register_(\d+)_norm")}
    return (
        Panel(title="Loss", curves=loss, colours=("#000000", NORMAL, OUTLIER, CLASS, REGISTER, GREY)),
        Panel(title="Learning rate", curves=_chosen(training, {"lr": "learning rate"}), colours=(GREY,)),
        Panel(
            title="Scores on held-out images", curves=scores, colours=(NORMAL, CLASS, REGISTER, GREY), mark=history.best
        ),
        Panel(title="Outliers among the patch tokens", curves=outliers, colours=(GREY, OUTLIER), share=True),
        Panel(
            title=f"Norms of patch tokens, block {last}",
            curves=_chosen(evaluation, norms),
            colours=(OUTLIER, GREY, NORMAL),
            log=True,
        ),
        Panel(title=f"Norms of registers, block {last}", curves=registers),
    )


def _matching(curves: Mapping[str, Curve], pattern: str) -> Iterator[tuple[str, Curve]]:
    """Yield curves with what the group of the pattern finds in their names."""
    for name, curve in curves.items():
        if match := re.fullmatch(pattern, name):
            yield match[1], curve


def _chosen(curves: Mapping[str, Curve], labels: Mapping[str, str]) -> dict[str, Curve]:
    return {label: curves[name] for name, label in labels.items() if name in curves}


def _figure(shown: Sequence[Panel], title: str) -> Figure:
    columns = 2 if len(shown) == 4 else min(len(shown), COLUMNS)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.5 * columns, 2.5 * rows + 0.5), layout="constrained")
    figure.suptitle(plain(title), fontsize=11)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(shown) :]:
        axis.remove()
    most = max(1, *(max(curve) for panel in shown for curve in panel.curves.values()))
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, panel)
        axis.set_xlim(-0.02 * most, 1.02 * most)
        axis.set_xlabel("steps", fontsize=8)
        whole_numbers(axis.xaxis, 4)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw(axis: Axes, panel: Panel) -> None:
    colour = _colours(panel)
    for index, (label, curve) in enumerate(panel.curves.items()):
        steps = sorted(curve)
        marker = "o" if len(steps) <= MOST_DOTS else ""
        values = [curve[step] for step in steps]
        axis.plot(steps, values, marker=marker, markersize=2.5, linewidth=1.2, color=colour(index), label=plain(label))
    axis.set_title(panel.title, fontsize=9)
    if panel.mark is not None:
        axis.axvline(panel.mark, color=OUTLIER, linestyle=":", linewidth=1.2, label="best")
    if panel.share:
        top = max(value for curve in panel.curves.values() for value in curve.values())
        axis.set_ylim(-0.04 * top or -0.001, 1.12 * top or 0.01)
        percent_axis(axis.yaxis)
    positive = [value for curve in panel.curves.values() for value in curve.values() if value > 0]
    if panel.log and positive:
        low, high = positive_limits(positive)
        axis.set(yscale="log", ylim=(low, high))
        log_axis(axis.yaxis, low, high)
    if len(axis.get_lines()) > 1:
        axis.legend(fontsize=6, frameon=False, ncols=2 if len(panel.curves) > 4 else 1)


def _colours(panel: Panel) -> Callable[[int], object]:
    if len(panel.curves) <= len(panel.colours):
        return panel.colours.__getitem__
    return matplotlib.colormaps["viridis"].resampled(len(panel.curves) + 1)  # without its pale end
