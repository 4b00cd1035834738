"""Protocols on pictures with masks, depths or boxes, and on CLIP models with their text tower."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.loading import Workers
from vitreg_hub.evaluation.dense.scoring import Example, evaluate_depth, evaluate_segmentation
from vitreg_hub.evaluation.dense.training import train_depth, train_segmentation
from vitreg_hub.evaluation.discovery import (
    BIASES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DiscoveryScore,
    Which,
    discovery,
    find_boxes,
    sweep_settings,
)
from vitreg_hub.evaluation.interventions import DONORS, INTERVENTIONS, Intervention, RegisterBank, intervened
from vitreg_hub.evaluation.opened import Opened, open_split
from vitreg_hub.evaluation.probing import class_score_rows
from vitreg_hub.evaluation.results import DataFacts, Protocol, ProtocolResult, Score, Setting
from vitreg_hub.evaluation.zero_shot import open_towers, zero_shot
from vitreg_hub.images.dense import AnnotatedSource, Target, open_annotated
from vitreg_hub.images.source import Images, open_images

TARGETS: Mapping[Protocol, Target] = {"segmentation": "mask", "depth": "depth", "discovery": "boxes"}
"""What each protocol needs of pictures."""

SMALL = "scenes"
"""The embedded pictures, on which heads are trained in seconds."""
SMALL_STEPS, SMALL_RATE = 400, 1e-2
SMALL_MAX_DEPTH = 12.0
"""Metres; the scenes' background ends at 10."""
EPOCHS = 32
"""Passes over the pictures that 40,000 steps of 16 are on ADE20k; smaller sets get as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSettings:
    """How dense protocols are done.

    Attributes:
        steps: Of the heads; None: as officially, or 32 passes over the pictures if that is less.
        max_depth: Metres beyond which depth is not scored; None: 10, and 12 for the embedded scenes.
        sweep: LOST on queries, keys and values of the last four blocks with every bias, chosen on training pictures.
        which: What LOST reads otherwise.
        block: Of which block.
        bias: Added to similarities.
    """

    steps: int | None = None
    max_depth: float | None = None
    sweep: bool = False
    which: Which = "keys"
    block: int = -1
    bias: float = 0.0


def dense_result(
    opened: Opened,
    protocol: Protocol,
    *,
    train: Images | None,
    test: Images,
    settings: DenseSettings,
    interventions: bool = True,
) -> tuple[ProtocolResult, tuple[Example, ...]]:
    """Run one protocol on pictures with annotations.

    Args:
        opened: The model.
        protocol: segmentation, depth or discovery.
        train: Pictures to learn from; by default the other part of the test pictures.
        test: Pictures to score.
        settings: How.
        interventions: Whether the registers are changed as well, where there are any.

    Returns:
        The result, and examples of it.

    Raises:
        DataError: The pictures lack what the protocol needs, or the model cannot be read.
    """
    target = TARGETS[protocol]
    pictures = _open(opened, test, target, "test")
    learns = protocol != "discovery" or settings.sweep
    lessons = _open(opened, test if train is None else train, target, "train") if learns else None
    work = {"segmentation": _segmentation, "depth": _depth, "discovery": _discovery}[protocol]
    score, told = work(opened, lessons, pictures, settings)
    scores, per_class, examples, table = score()
    changed: dict[Intervention, tuple[Score, ...]] = {}
    if interventions and opened.layout.num_registers:
        bank = _bank(opened, pictures if lessons is None else lessons)
        for kind in INTERVENTIONS:
            with intervened(opened.model, kind, bank):
                changed[kind] = score()[0]
    result = ProtocolResult(
        protocol=protocol,
        train=None if lessons is None else _facts(lessons),
        test=_facts(pictures),
        settings=told | {"image size": opened.vit.size, "seed": opened.seed},
        scores=scores,
        interventions=changed,
        per_class=per_class,
        table=table,
    )
    return result, examples


def _open(opened: Opened, images: Images, target: Target, split: str) -> AnnotatedSource:
    if not isinstance(images, str | Path) and not hasattr(images, "features"):
        raise DataError(f"{type(images).__name__} has no annotations: give a folder, a data set or a name.")
    most = opened.options.get("max_images")
    data: Any = images
    return open_annotated(data, target, split=split, max_images=most, seed=opened.seed)


def _facts(source: AnnotatedSource) -> DataFacts:
    classes = (source.class_names or ()) if source.target == "mask" else ()
    return DataFacts(name=source.name, num_images=len(source), classes=classes)


def _bank(opened: Opened, pictures: AnnotatedSource) -> RegisterBank:
    number = min(DONORS, len(pictures))
    return opened.bank(open_images([pictures[index].image for index in range(number)]))


def _workers(opened: Opened) -> Workers:
    return Workers(
        rank=opened.processes.process_index,
        world_size=opened.processes.num_processes,
        num_workers=opened.options.get("num_workers", 0),
        progress=opened.shows_progress,
    )


def _pixels(opened: Opened) -> dict[str, Any]:
    """Mean and std of the model's images; ImageNet's where they are unknown."""
    return {"mean": opened.vit.mean or IMAGENET_MEAN, "std": opened.vit.std or IMAGENET_STD}


def _training(source: AnnotatedSource, settings: DenseSettings, official: int, batch_size: int = 16) -> dict[str, Any]:
    """How a head is trained on so many pictures."""
    if source.name.partition(":")[0] == SMALL:
        return {"steps": settings.steps or SMALL_STEPS, "lr": SMALL_RATE, "augment": False}
    return {"steps": settings.steps or max(1, min(official, EPOCHS * len(source) // batch_size))}


def _segmentation(opened: Opened, train: Any, test: AnnotatedSource, settings: DenseSettings):
    crop = min(opened.vit.size) if opened.vit.size else 512
    how = _training(train, settings, 40_000)
    head = train_segmentation(
        opened.model, train, **_pixels(opened), crop=crop, seed=opened.seed, workers=_workers(opened), **how
    )

    def score():
        found = evaluate_segmentation(head, test, crop=crop, workers=_workers(opened))
        rows = (
            Score(name="mean IoU", value=found.scores.mean_iou),
            Score(name="pixel accuracy", value=found.scores.accuracy),
            Score(name="mean accuracy of the classes", value=found.scores.mean_accuracy),
        )
        per_class = tuple(None if np.isnan(iou) else iou for iou in found.scores.per_class)
        return rows, per_class, found.examples, {}

    told: dict[str, Setting] = {"head": "batch norm, 1 x 1 convolution", "window": crop, **how}
    return score, told


def _depth(opened: Opened, train: Any, test: AnnotatedSource, settings: DenseSettings):
    size, small = opened.vit.size, train.name.partition(":")[0] == SMALL
    limit = settings.max_depth or (SMALL_MAX_DEPTH if small else 10.0)
    how = _training(train, settings, 38_400)
    crop = size if small and size else (416, 544)
    head = train_depth(
        opened.model,
        train,
        **_pixels(opened),
        crop=crop,
        input_size=size,
        max_depth=limit,
        seed=opened.seed,
        workers=_workers(opened),
        **how,
    )
    part = "nyu_eigen" if "nyu" in test.name.lower() else None

    def score():
        found = evaluate_depth(head, test, crop=part, input_size=size, workers=_workers(opened))
        shares = {"a1", "a2", "a3"}
        metres = {"rmse", "mae", "sq_rel"}
        rows = tuple(
            Score(
                name=name,
                value=value,
                unit="share" if name in shares else "m" if name in metres else "",
                higher_is_better=name in shares,
            )
            for name, value in asdict(found.scores).items()
        )
        return rows, (), found.examples, {}

    told: dict[str, Setting] = {"head": "256 bins", "max depth": limit, "scored part": part or "all", **how}
    return score, told


def _discovery(opened: Opened, train: Any, test: AnnotatedSource, settings: DenseSettings):
    shared = _pixels(opened) | {
        "normalize": settings.sweep,
        "rank": opened.processes.process_index,
        "world_size": opened.processes.num_processes,
    }
    table: dict[str, float] = {}
    which, block, bias = settings.which, settings.block, settings.bias
    if settings.sweep:  # once, so that changed registers are scored with the same features
        tried = find_boxes(opened.model, train, sweep_settings(BIASES), **shared)
        which, block, bias = tried.best.which, tried.best.block, tried.best.bias
        table = {str(setting): share for setting, share in tried.scores.items()}

    def score():
        found = discovery(opened.model, test, which=which, block=block, biases=(bias,), **shared)
        taken = f"CorLoc, {found.setting}"
        rows = (Score(name=taken, value=found.corloc.value, low=found.corloc.low, high=found.corloc.high),)
        return rows, (), box_examples(found, test), table

    told: dict[str, Setting] = {"features": "sweep" if settings.sweep else f"{settings.which} of {settings.block}"}
    told |= {"bias": None if settings.sweep else settings.bias, "chosen on": "training pictures" if train else "given"}
    return score, told


def box_examples(found: DiscoveryScore, source: Any, *, most: int = 4) -> tuple[Example, ...]:
    """The first pictures that have true boxes, with the box that was found in each.

    Args:
        found: Of all pictures of the source.
        source: As of `discovery`.
        most: Pictures at most.
    """
    scored = np.flatnonzero(~np.isnan(found.hits))[:most]
    pictures = [(source[int(i)], found.boxes[i : i + 1]) for i in scored]
    return tuple(Example(name=p.name, image=p.image, predicted=box, truth=np.asarray(p.boxes)) for p, box in pictures)


def zero_shot_result(opened: Opened, model: Any, *, test: Images) -> ProtocolResult:
    """Classify images by the names of their classes.

    Args:
        opened: How an evaluation runs.
        model: A CLIP model with its text tower, as `open_towers` takes it.
        test: Labelled images whose classes have names.

    Raises:
        DataError: The model has no text tower, or the images have no named classes.
    """
    towers = open_towers(model, device=opened.device)
    source = open_split(test, "test", max_images=opened.options.get("max_images"), seed=opened.seed)
    if source is None or not source.label_names:
        raise DataError("zero-shot classification needs images whose classes have names: give one folder per class.")
    seen_by = replace(opened, vit=replace(opened.vit, transform=towers.transform))
    found = zero_shot(
        towers,
        seen_by.batches(source, "test images"),
        names=source.label_names,
        progress=opened.shows_progress,
        world_size=opened.processes.num_processes,
    )
    return ProtocolResult(
        protocol="zero-shot",
        test=DataFacts(name=source.name, num_images=found.num_images, classes=source.label_names),
        settings={"templates": "OpenAI's 80 for ImageNet", "image size": towers.size, "seed": opened.seed},
        scores=class_score_rows(found),
        per_class=found.per_class,
        confusion=found.confusion,
    )
