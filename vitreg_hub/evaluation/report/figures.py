"""Figures of an evaluation: scores with their intervals, and confused classes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitreg_hub.evaluation.dense.scoring import Example
from vitreg_hub.evaluation.interventions import INTERVENTIONS, Intervention
from vitreg_hub.evaluation.report.pictures import examples_figure
from vitreg_hub.evaluation.report.tables import MOST_CLASSES, Named, by_protocol, class_names, confusion
from vitreg_hub.evaluation.report.words import WORDS
from vitreg_hub.evaluation.results import EvalReport, Protocol, Score
from vitreg_hub.evaluation.wording import REGISTERS, names, quoted_name, told
from vitreg_hub.pages.content import ReportFigure
from vitreg_hub.pages.figures import colour_map, legend, panels, patch
from vitreg_hub.plotting import CLASS, NORMAL, OUTLIER, REGISTER, percent_axis, plain, png

Examples = Mapping[Protocol, Sequence[Example]]
"""Pictures of one model by protocol: classes of pixels, metres, or boxes."""

COLOURS: dict[Intervention | None, str] = {None: NORMAL, "zeroed": OUTLIER, "mean": CLASS, "shuffled": REGISTER}
WRITTEN = 12
"""Most classes whose counts are written into their cells."""
SIDE_BY_SIDE = 20
"""Most classes whose confusions stand side by side."""

SCORES = "Bars: {name}."
INTERVALS = (
    " Lines: the 95 % interval for more images of the same kind; where two of them overlap, these images do not tell "
    "which score is higher."
)
CHANGED = (
    " Registers were changed after every block. No image gives zeros, so zeroed registers cost more than what they "
    "knew; what registers of other images cost is what registers know of this image."
)
CONFUSED = "Rows are the true classes, columns what they were called; the darker, the larger the share of the row."
PICTURES: dict[Protocol, str] = {
    "segmentation": "Each colour is a class; white pixels do not count.",
    "depth": "Dark is near, bright is far, on one scale in each row; white pixels are unknown.",
    "discovery": "Solid: the predicted box. Dashed: the true ones.",
}


def eval_figures(reports: Sequence[EvalReport], examples: Sequence[Examples] = ()) -> tuple[ReportFigure, ...]:
    """Draw what the reports and examples hold; what has no data is left out.

    Args:
        reports: Of the models.
        examples: Of each model, in the same order; none where there are none.
    """
    drawn: list[ReportFigure] = []

    def add(protocol: Protocol, name: str, caption: str, figure: Figure, of: Sequence[str]) -> None:
        alt = f"{figure.get_suptitle()}: {', '.join(of)}".replace(r"\$", "$")
        file = f"{protocol}_{name}".replace("-", "_")
        drawn.append(ReportFigure(section=protocol, name=file, alt=alt, caption=caption, png=png(figure)))

    for protocol, named in by_protocol(reports).items():
        scored = [(name, result) for name, result in named if result.scores]
        changed = any(result.interventions for _, result in scored)
        if len(scored) > 1 or changed:
            known = any(result.scores[0].low is not None for _, result in scored)
            caption = SCORES.format(name=quoted_name([r for _, r in scored])) + known * INTERVALS + changed * CHANGED
            add(protocol, "scores", caption, scores_figure(scored), [name for name, _ in scored])
        confused = [(name, r) for name, r in named if 0 < len(confusion(r)[0]) <= MOST_CLASSES]
        if confused:
            add(protocol, "confusion", CONFUSED, confusion_figure(confused), [name for name, _ in confused])
        own = {name: one[protocol] for name, one in zip(names(reports), examples, strict=False) if one.get(protocol)}
        if own:
            figure = examples_figure(protocol, own, class_names(named[0][1]))
            add(protocol, "examples", PICTURES[protocol], figure, list(own))
    return tuple(drawn)


def scores_figure(named: Named) -> Figure:
    """Bars of the score to quote with its interval, for each model as it is and with its registers changed."""
    first, called = named[0][1].scores[0], plain(quoted_name([result for _, result in named]))
    rows: list[tuple[float, Intervention | None, Score]] = []
    middles, place = [], 0.0
    for _, result in named:
        kinds = [(None, result.scores), *((k, result.interventions.get(k, ())) for k in INTERVENTIONS)]
        own = [(kind, scores[0]) for kind, scores in kinds if scores]
        rows += [(place + i, kind, score) for i, (kind, score) in enumerate(own)]
        middles.append(place + (len(own) - 1) / 2)
        place += len(own) + 0.6
    figure = Figure(figsize=(7.0, 1.6 + 0.28 * place), layout="constrained")
    figure.suptitle(f"{WORDS[named[0][1].protocol][0]}: {called}", fontsize=12)
    axis = figure.subplots()
    for at, kind, score in rows:
        axis.barh(at, score.value, height=0.8, color=COLOURS[kind])
        ends = [end for end in (score.low, score.high) if end is not None and math.isfinite(end)]
        if len(ends) == 2:
            axis.plot(ends, (at, at), "k|-", linewidth=1.2, markersize=7)
        axis.annotate(
            told(score), (max(score.value, *ends, 0), at), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    most = max(max(score.value, score.high or 0) for *_, score in rows)
    axis.set(ylim=(place - 0.9, -0.7), xlim=(min(0, *(s.value for *_, s in rows)), 1.45 * most or 1))
    axis.set_yticks(middles, [plain(name) for name, _ in named], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    if first.unit == "share":
        axis.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, most) if tick <= 1])
        percent_axis(axis.xaxis)
    axis.set_xlabel(
        f"{called}{f' [{first.unit}]' if first.unit == 'm' else ''} "
        f"({'higher' if first.higher_is_better else 'lower'} is better)",
        fontsize=8,
    )
    axis.spines[["top", "right"]].set_visible(False)
    used = {kind for _, kind, _ in rows}
    if len(used) > 1:
        labels = {None: "registers as they are", **{kind: f"registers: {REGISTERS[kind]}" for kind in INTERVENTIONS}}
        legend(figure, [patch(COLOURS[kind], label) for kind, label in labels.items() if kind in used])
    return figure


def confusion_figure(named: Named) -> Figure:
    """Which classes were called which, one panel per model; few classes with their counts."""
    matrices = [confusion(result) for _, result in named]
    most = max(len(classes) for classes, _ in matrices)
    title = f"{WORDS[named[0][1].protocol][0]}: classes that are confused"
    titles = [name for name, _ in named]
    if most <= SIDE_BY_SIDE:
        figure, axes = panels(titles, title=title, height=3.6, share="none")
    else:
        figure = Figure(figsize=(9.5, 9.5 * len(named) + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=12)
        axes = list(figure.subplots(len(named), squeeze=False)[:, 0])
        for axis, name in zip(axes, titles, strict=True):
            axis.set_title(plain(name), fontsize=10)
    shades = colour_map("#ffffff", NORMAL)
    for axis, (classes, counts) in zip(axes, matrices, strict=True):
        shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
        axis.imshow(shares, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        size = 8 if most <= WRITTEN else 6
        labels = [plain(label if len(label) <= 18 else f"{label[:17]}…") for label in classes]
        axis.set_xticks(range(len(classes)), labels, rotation=90, fontsize=size)
        axis.set_yticks(range(len(classes)), labels, fontsize=size)
        axis.set_xlabel("called", fontsize=8)
        axis.set_ylabel("class", fontsize=8)
        if len(classes) <= WRITTEN:
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    colour = "white" if shares[row, column] > 0.6 else "black"
                    axis.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=colour)
    return figure
