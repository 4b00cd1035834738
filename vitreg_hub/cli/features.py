"""`vitreg features`."""

import sys
from pathlib import Path
from typing import Literal

from vitreg_hub.cli.arguments import ImageSize, N, NumberType, OptionalN
from vitreg_hub.cli.values import image_size
from vitreg_hub.console import hide_loading


def run(
    model: str,
    *,
    images: str,
    out: str,
    kind: Literal["class", "registers", "patches-mean", "dense"] = "class",
    dtype: NumberType = "float32",
    img_size: ImageSize = None,
    max_images: OptionalN = None,
    batch_size: N = 32,
    num_workers: N = 0,
    device: str | None = None,
    seed: int = 0,
) -> None:
    """Write a ViT's features of images as safetensors files; run it again after a stop and it goes on.

    Args:
        model: bundle's folder, hf-hub:org/name, a name of `list` or of a ViT of timm, with or without the tag
            of its weights
        images: folder, photos, digits, scenes, or org/name[:split] on the Hub
        out: folder for index.json and the files, which hold `features`, `indices` and, if known, `labels`
        kind: the class token, all registers, the mean of the patches, or all patches by rows and columns, after the
            final norm
        dtype: number type in the files; the network computes in float32
        img_size: size of the images, if not the model's own
        max_images: use no more: a random choice of them
        batch_size: images at a time, in each process
        num_workers: processes that decode images
        device: cpu, cuda, cuda:1, ...; a GPU if there is one
        seed: decides which images are used where not all are
    """
    size = image_size(img_size)
    from accelerate import PartialState

    from vitreg_hub.evaluation.feature_files import INDEX_FILE, write_features

    hide_loading()
    index = write_features(
        model,
        images,
        out,
        kind=kind,
        store=dtype,
        img_size=size,
        max_images=max_images,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        seed=seed,
        progress=sys.stderr.isatty(),
    )
    if PartialState().is_main_process:
        number = sum(len(shard.images) for shard in index.shards)
        each = " x ".join(map(str, index.settings.shape))
        print(f"features {number} images, {each} numbers each, in {len(index.shards)} files")
        print(f"index    {Path(out, INDEX_FILE)}")
