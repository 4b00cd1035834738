"""`vitreg predict`."""

import csv
import io
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from vitreg_hub.cli.arguments import ImageSize, N, NumberType
from vitreg_hub.cli.values import image_size, print_table
from vitreg_hub.console import hide_loading
from vitreg_hub.files import require_absent, whole_file

if TYPE_CHECKING:
    from vitreg_hub.evaluation.predict import Prediction

Format = Literal["table", "csv", "json"]


def run(
    model: str,
    *images: Annotated[str, "IMAGE"],
    top: N = 5,
    format: Format = "table",
    out: str | None = None,
    img_size: ImageSize = None,
    batch_size: N = 32,
    num_workers: N = 0,
    device: str | None = None,
    dtype: NumberType = "float32",
) -> None:
    """Tell the most probable classes of pictures, by a ViT's own head.

    Args:
        model: bundle's folder, hf-hub:org/name, a name of `list` or of a ViT of timm, with or without the tag
            of its weights
        *images: image files, and folders with all images below them; or one of photos, digits, scenes, or
            org/name[:split] on the Hub
        top: classes of each picture
        format: a table, or one line for each class of each picture (csv), or one entry for each picture (json)
        out: new file, in place of the screen
        img_size: size of the images, if not the model's own
        batch_size: images at a time, in each process
        num_workers: processes that decode images
        device: cpu, cuda, cuda:1, ...; a GPU if there is one
        dtype: number type of the model
    """
    if out:
        require_absent(Path(out))
    size = image_size(img_size)
    import torch
    from accelerate import PartialState

    from vitreg_hub.evaluation.predict import predict

    hide_loading()
    predictions = predict(
        model,
        images[0] if len(images) == 1 else images,
        top=top,
        img_size=size,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        dtype=getattr(torch, dtype),
        progress=sys.stderr.isatty(),
    )
    if not PartialState().is_main_process:
        return
    text = _text(predictions, format)
    if not out:
        print(text, end="")
        return
    with whole_file(Path(out)) as new:
        new.write_text(text, encoding="utf-8", newline="")
    print(f"classes of {len(predictions)} pictures   {out}")


def _text(predictions: "list[Prediction]", format: Format) -> str:
    if format == "json":
        return json.dumps([asdict(prediction) for prediction in predictions], indent=2, ensure_ascii=False) + "\n"
    text = io.StringIO(newline="")
    if format == "csv":
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("image", "rank", "number", "name", "probability"))
        for prediction in predictions:
            for rank, guess in enumerate(prediction.guesses, 1):
                rows.writerow((prediction.image, rank, guess.number, guess.name, guess.probability))
    else:
        table = [("image", "probability", "class")]
        for prediction in predictions:
            for rank, guess in enumerate(prediction.guesses):
                table.append(("" if rank else prediction.image, f"{guess.probability:.4f}", guess.name))
        with redirect_stdout(text):
            print_table(table)
    return text.getvalue()
