"""`vitreg evaluate`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from vitreg_hub.cli.arguments import ImageSize, N, NumberType, OptionalN
from vitreg_hub.cli.values import image_size
from vitreg_hub.console import hide_loading
from vitreg_hub.files import require_absent

Wanted = Literal["all", "classify", "knn", "linear", "logreg", "zero-shot", "segmentation", "depth", "discovery"]


def run(
    protocol: Wanted,
    *models: Annotated[str, "MODEL"],
    train: Annotated[str | None, "T"] = None,
    test: Annotated[str | None, "T"] = None,
    out: str = "evaluation",
    artifacts: Annotated[str | None, "FOLDER"] = None,
    no_interventions: bool = False,
    sweep: bool = False,
    steps: OptionalN = None,
    img_size: ImageSize = None,
    max_images: OptionalN = None,
    batch_size: N = 32,
    num_workers: N = 0,
    device: str | None = None,
    dtype: NumberType = "float32",
    seed: int = 0,
) -> None:
    """Score one or more ViTs side by side, as the registers paper and DINOv2 do, and write a report.

    Args:
        protocol: what to score: the model's own head (classify), its features by knn, linear or logreg, zero-shot for
            CLIP models, linear segmentation or depth, object discovery by LOST, or all that the data allow
        *models: as for `vitreg analyze`
        train: folder, embedded set, or org/name[:split] on the Hub to learn from; by default the other part of the
            test images
        test: the same to score; by default digits for classes, and scenes for masks, depths and boxes
        out: new folder for report.html, report.json and the figures
        artifacts: report of `vitreg analyze` on the same models, which the new one and it link to each other
        no_interventions: do not score again with the registers zeroed, replaced by their mean, and shuffled
        sweep: discovery on queries, keys and values of the last four blocks with every bias
        steps: training steps of linear probes and dense heads
        img_size: size of the images, if not the model's own
        max_images: use no more of each source: a random choice of them
        batch_size: images at a time, in each process
        num_workers: processes that decode images
        device: cpu, cuda, cuda:1, ...; a GPU if there is one
        dtype: number type of the model
        seed: decides all that is drawn
    """
    require_absent(Path(out))
    import torch
    from accelerate import PartialState

    from vitreg_hub.evaluation.dense_protocols import DenseSettings
    from vitreg_hub.evaluation.engine import Settings, evaluate_all
    from vitreg_hub.evaluation.linear import LinearSettings
    from vitreg_hub.evaluation.report.write import REPORT_PAGE, write_report
    from vitreg_hub.evaluation.wording import names, verdict

    hide_loading()
    found = evaluate_all(
        models,
        None if protocol == "all" else protocol,
        train=train,
        test=test,
        settings=Settings(
            interventions=not no_interventions,
            linear=LinearSettings(steps=steps, seed=seed),
            dense=DenseSettings(steps=steps, sweep=sweep),
        ),
        img_size=image_size(img_size),
        max_images=max_images,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        dtype=getattr(torch, dtype),
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    if not PartialState().is_main_process:
        return
    reports = [one.report for one in found]
    write_report(reports, out, examples=[one.examples for one in found], artifacts=artifacts)
    for name, report in zip(names(reports), reports, strict=True):
        print(f"{name}: {verdict(report)}")
        for note in report.notes:
            print(f"  {note}")
    print(f"report   {Path(out, REPORT_PAGE)}")
