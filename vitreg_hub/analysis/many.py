"""Several models at once: of different sizes, or the checkpoints of a training run."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Unpack

from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.analysis.engine import PHOTOS, Options
from vitreg_hub.analysis.measures import Model, analyze
from vitreg_hub.analysis.results import ArtifactReport, load_reports
from vitreg_hub.errors import DataError
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.images.source import Images
from vitreg_hub.names import ModelName

logger = logging.getLogger(__name__)

STEP = re.compile(r"(?:^|/)(?:(?:step|checkpoint|iter|iteration|epoch)[-_]?)?(\d+)(?:/|$)")
"""A folder that is named after a training step, alone or in a path."""
MAX_DEPTH = 3
"""How deep below a run's folder its checkpoints may be."""


def analyze_all(
    models: Sequence[Model], images: Images = PHOTOS, **options: Unpack[Options]
) -> tuple[ArtifactReport, ...]:
    """Analyze several models on the same images: when, where and from which size on artifacts appear.

    Source: Darcet et al., section 2.1 and figure 4.

    Args:
        models: Models as in `analyze`; folders of training runs, for all of their checkpoints in the order of their
            steps; and report.json files of earlier analyses.
        **options: See `Options`.

    Raises:
        VitregError: A model or the images cannot be used; the message says why.
    """
    planned: list[tuple[Model | ArtifactReport, int | None]] = []  # complete before any work, to show mistakes at once
    for model in models:
        if isinstance(model, str | Path) and Path(model).suffix == ".json":
            planned += [(report, None) for report in load_reports(model)]
        else:
            planned += expand(model)
    for model, _ in planned:
        if isinstance(model, str | Path):
            ModelName.parse(model).require_known()
    return tuple(
        model if isinstance(model, ArtifactReport) else analyze(model, images, step=step, **options)
        for model, step in planned
    )


def expand(model: Model) -> Iterator[tuple[Model, int | None]]:
    """Yield a model, or the checkpoints of a training run's folder, each with its step as far as it is known.

    A run's folder holds no model itself but folders of models with their step in their paths (``run/step_2000``,
    ``run/checkpoint-2000/model``). Models without one, such as ``run/best``, are left out, with a message.

    Raises:
        DataError: A folder holds neither a model nor checkpoints.
    """
    run = ModelName.parse(model).path if isinstance(model, str | Path) else None
    if run is None or not run.is_dir() or (run / CONFIG_FILE).exists():
        yield model, None
        return
    configs = [path for depth in range(1, MAX_DEPTH + 1) for path in run.glob("*/" * depth + CONFIG_FILE)]
    found = {path.parent: STEP.search(path.parent.relative_to(run).as_posix()) for path in configs}
    steps = {folder: int(match[1]) for folder, match in found.items() if match}
    if not steps:
        advice = "give a model's folder, or a run's"
        if found:
            advice = f"it holds models, give one, such as {min(found)}"
        elif any(path.suffix.lower() in IMG_EXTENSIONS for pattern in ("*", "*/*") for path in run.glob(pattern)):
            advice = "it holds images, which --images takes"
        raise DataError(
            f"{run} holds neither a model ({CONFIG_FILE}) nor checkpoints in folders with their step in the name "
            f"(step_1000): {advice}."
        )
    if left_out := sorted(str(folder) for folder in found.keys() - steps.keys()):
        logger.info("left out, because their names hold no step: %s", ", ".join(left_out))
    yield from sorted(steps.items(), key=lambda checkpoint: (checkpoint[1], str(checkpoint[0])))
