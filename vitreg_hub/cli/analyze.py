"""`vitreg analyze`."""

from pathlib import Path
from typing import Annotated

from vitreg_hub.cli.arguments import ImageSize, N, NumberType, OptionalN
from vitreg_hub.cli.values import analysis_options
from vitreg_hub.console import hide_loading
from vitreg_hub.errors import VitregError
from vitreg_hub.files import CONFIG_FILE, require_absent


def run(
    *models: Annotated[str, "MODEL"],
    images: str = "photos",
    out: str = "analysis",
    cutoff: Annotated[float | None, "NORM"] = None,
    block: int = -1,
    img_size: ImageSize = None,
    max_images: OptionalN = None,
    batch_size: N = 8,
    num_workers: N = 0,
    device: str | None = None,
    dtype: NumberType = "float32",
    seed: int = 0,
    card: bool = False,
) -> None:
    """Measure high-norm artifacts of one or more ViTs as the paper does, and write a report.

    Args:
        *models: bundle's folder, hf-hub:org/name, a name of `list` or of a ViT of timm, with or without
            the tag of its weights; a run's
            folder of checkpoints; an earlier report.json
        images: folder, photos, digits, or org/name[:split] on the Hub
        out: new folder for report.html, report.json and the figures
        cutoff: norm above which a patch token is an outlier
        block: block whose outliers count, from 0, or from the end
        img_size: size of the images, if not the model's own
        max_images: use no more: a random choice of them
        batch_size: images at a time, in each process
        num_workers: processes that decode images
        device: cpu, cuda, cuda:1, ...; a GPU if there is one
        dtype: number type of the model
        seed: decides what is drawn where not all is used
        card: also record the result in the models, which must be bundles' folders
    """
    require_absent(Path(out))
    from accelerate import PartialState

    from vitreg_hub.analysis.many import analyze_all
    from vitreg_hub.analysis.report.write import write_report
    from vitreg_hub.analysis.wording import names, verdict
    from vitreg_hub.bundle.config import read_config
    from vitreg_hub.model_cards.artifacts import record
    from vitreg_hub.pages.content import REPORT_PAGE

    hide_loading()
    for model in models if card else ():
        if not Path(model, CONFIG_FILE).is_file():
            raise VitregError(f"--card records results in bundles' folders, but {model} is none: leave --card out.")
        read_config(Path(model), called=model)
    reports = analyze_all(
        models,
        images,
        cutoff=cutoff,
        max_images=max_images,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        **analysis_options(block=block, img_size=img_size, device=device, dtype=dtype),
    )
    if not PartialState().is_main_process:
        return
    write_report(reports, out)
    for name, report in zip(names(reports), reports, strict=True):
        print(f"{name}: {verdict(report)}")
        for note in report.notes:
            print(f"  {note}")
    print(f"report   {Path(out, REPORT_PAGE)}")
    if not card:
        return
    for model, report in zip(models, reports, strict=True):
        done = "recorded in the bundle and its card" if record(model, report) else "recorded; its card is an author's"
        print(f"card     {model}: {done}")
