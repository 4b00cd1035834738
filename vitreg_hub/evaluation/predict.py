"""Which classes a model's own head tells of pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.labels import class_names, in_words
from vitreg_hub.evaluation.opened import Opened, Options
from vitreg_hub.images.data_sets import image_files
from vitreg_hub.images.source import Images, ImageSource, open_images
from vitreg_hub.passes import Needs, failing_together, gathered, observed


@dataclass(frozen=True, kw_only=True, slots=True)
class Guess:
    """A class that may be seen in a picture.

    Attributes:
        number: Of the class in the model, from 0.
        name: Of the class; its number where the model knows no names.
        probability: By the softmax over all classes.
    """

    number: int
    name: str
    probability: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model tells of one picture.

    Attributes:
        image: The picture's file, or its number.
        guesses: The most probable classes, best first.
    """

    image: str
    guesses: tuple[Guess, ...]


def predict(
    model: nn.Module | str | Path, images: Images | Sequence[str | Path], *, top: int = 5, **options: Unpack[Options]
) -> list[Prediction]:
    """The most probable classes of each picture, by the model's own head, the same on every process.

    Pictures that cannot be read are left out, with a line in the log.

    Args:
        model: As `open_vit` takes it.
        images: A file; a folder, with all pictures below it; several of both; or images as `open_images` takes them.
        top: Classes of each picture, at most all.
        **options: As of `Options`.

    Raises:
        DataError: The model has no head, there are no pictures, or none of them can be read.
    """
    if top < 1:
        raise DataError(f"top is {top}: give at least 1 class.")
    source = _opened(images, options)
    opened = Opened.of(model, **options)
    names = class_names(opened.model)
    mine: dict[int, Prediction] = {}
    with failing_together(world_size=opened.processes.num_processes):
        batches = opened.batches(source, "prediction", skip_unreadable=True)
        for seen, batch in observed(opened.model, batches, Needs(logits=True)):
            files = batch.files or [""] * len(batch.indices)
            for index, file, logits in zip(batch.indices.tolist(), files, seen.logits.cpu(), strict=True):
                mine[index] = Prediction(image=file or str(index), guesses=_guesses(logits, names, top))
    found = {
        index: prediction
        for share in gathered(mine, world_size=opened.processes.num_processes)
        for index, prediction in share.items()
    }
    if not found:
        raise DataError(f"none of the pictures of {source.name} could be read: give others.")
    return [found[index] for index in sorted(found)]


def _opened(images: Images | Sequence[str | Path], options: Options) -> ImageSource:
    limits = {"max_images": options.get("max_images"), "seed": options.get("seed", 0)}
    if isinstance(images, str | Path) and os.path.exists(images):
        return open_images(image_files([images]), name=str(images), **limits)
    paths = [image for image in images if isinstance(image, str | Path)] if isinstance(images, list | tuple) else []
    if isinstance(images, list | tuple) and paths and len(paths) == len(images):
        return open_images(image_files(paths), name="the list", **limits)
    return open_images(images, **limits)  # pyright: ignore[reportArgumentType]  # a list of paths is done


def _guesses(logits: Tensor, names: Sequence[str], top: int) -> tuple[Guess, ...]:
    best = logits.float().softmax(dim=0).topk(min(top, len(logits)))
    return tuple(
        Guess(number=number, name=in_words(names[int(number)]) if names else str(number), probability=probability)
        for number, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
