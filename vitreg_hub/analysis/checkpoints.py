"""Several models at once: of different sizes, or the checkpoints of a training run."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

from vitreg_hub.analysis.engine import Images, Options
from vitreg_hub.analysis.measures import Model, analyze
from vitreg_hub.analysis.report_json import load_reports
from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.errors import DataError
from vitreg_hub.hub_access import CONFIG_FILE

NUMBER = re.compile(r"\d+")
MAX_DEPTH = 3
"""How many folders below a run's folder its checkpoints may be."""


def analyze_all(
    models: Sequence[Model], images: Images = "photos", **options: Unpack[Options]
) -> tuple[ArtifactReport, ...]:
    """Analyze several models on the same images: when, where and from which size on artifacts appear.

    Source: Darcet et al., section 2.1 and figure 4.

    Args:
        models: Models as in `analyze`, folders of training runs, which stand for their checkpoints in the order of
            their steps, and report.json files of earlier analyses, which are taken as they are.
        images: Images as in `analyze`.
        **options: See `Options`.

    Raises:
        VitregError: A model or the images cannot be used; the message says why.
    """
    reports: list[ArtifactReport] = []
    for model, step in itertools.chain.from_iterable(map(expand, models)):
        if is_report(model):
            reports += load_reports(model)
        else:
            reports.append(analyze(model, images, step=step, **options))
    return tuple(reports)


def is_report(model: Model) -> bool:
    """Whether this names the report of an earlier analysis."""
    return isinstance(model, str | Path) and Path(model).suffix == ".json"


def expand(model: Model) -> Iterator[tuple[Model, int | None]]:
    """Yield a model, or the checkpoints of a training run's folder, each with its step as far as it is known.

    A run's folder holds no model itself but folders of models with their step as the last number in their paths
    (``run/step_2000``, ``run/checkpoint-2000/model``).

    Raises:
        DataError: A folder holds neither a model nor checkpoints.
    """
    run = None if not isinstance(model, str | Path) else Path(model)
    if run is None or not run.is_dir() or (run / CONFIG_FILE).exists():
        yield model, None
        return
    configs = [path for depth in range(1, MAX_DEPTH + 1) for path in run.glob("*/" * depth + CONFIG_FILE)]
    numbers = {path.parent: NUMBER.findall(str(path.parent.relative_to(run))) for path in configs}
    steps = {folder: int(found[-1]) for folder, found in numbers.items() if found}
    if not steps:
        raise DataError(
            f"{run} holds neither a model ({CONFIG_FILE}) nor checkpoints in folders with their step in the name "
            "(step_1000): give a model's folder, or a run's."
        )
    yield from sorted(steps.items(), key=lambda checkpoint: (checkpoint[1], str(checkpoint[0])))
