"""All settings of a training run, nested and frozen. Does not import torch."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.tasks.ranges import (
    Amount,
    Area,
    BelowOne,
    Count,
    Epochs,
    NotNegative,
    Positive,
    Ratio,
    Share,
    Side,
    Width,
)
from vitreg_hub.training.tasks.settings import TaskSettings
from vitreg_hub.typed import shown, wanted

NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no file's name or config.json can hold: zero bytes, and bytes that are not UTF-8, as Python writes them."""

TRAINABLE = re.compile(r"all|head|lora|last:[1-9]\d{0,3}|registers(\+norms)?")
DecayRule = Literal["timm", "dinov2", "openclip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """The network that is trained.

    Attributes:
        arch: An architecture of `vitreg list`; None: the start's.
        registers: Number of registers, where `arch` is the start's; None: its own.
        start: Weights to start from: a bundle's folder, ``hf-hub:org/name``, or an architecture with a tag. None: from
            scratch. A start that differs from `arch` in the number of registers gets new ones, or loses its own.
        start_required: Whether the recipe is the second stage of a run and must not begin from scratch.
        img_size: Side of the images in pixels; None: the architecture's, or the start's.
        patch_size: Side of a patch in pixels; None: the architecture's, or the start's.
        drop_path: Probability of skipping a branch, the same in every block; each process draws for its own images.
        layer_scale: LayerScale of a network from scratch; None: the architecture's. DINOv2's 1e-5 is for hundreds of
            thousands of steps; it takes a few hundred before the blocks have any effect.
        head: The classifier that a run of classification begins with: the start's ("kept"), a new one ("new"), or the
            start's if its classes are those of the data ("auto").
        trainable: Which weights change: "all", "head" (the classifier), "last:N" (the last N blocks, the norm after
            them and the head), "lora" (low-rank changes of the attention's matrices, and the head), "registers", or
            "registers+norms". All others stay as they are, bit for bit.
        lora_rank: Rank of those changes, which are merged into the weights that are evaluated and published.
    """

    arch: str | None
    registers: int | None = None
    start: str | None = None
    start_required: bool = False
    img_size: Side | None = None
    patch_size: Side | None = None
    drop_path: BelowOne = 0.0
    layer_scale: NotNegative | None = None
    head: Literal["auto", "new", "kept"] = "auto"
    trainable: str = "all"
    lora_rank: Width = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """What is trained on, and what is held out.

    Attributes:
        train: An embedded set (digits, photos, scenes), a folder of images in class folders, parquet files, WebDataset
            shards (``shards/train-{0000..0099}.tar``, also as URL), or ``org/name[:split]`` on the Hub.
        test: The same kinds; never trained on. None: the held-out part of an embedded set, or `held_out`, else no score
            is measured.
        held_out: Share of each class of `train` that is not trained on but evaluated, if there is no `test`; the seed
            chooses the images.
        image_column: Column of images; None: the only one, or "image", "jpg" or "png".
        label_column: Column of labels; None: the only one of class labels, or "label" or "cls".
        text_column: Column of captions; None: "text", "txt" or "caption".
        num_classes: Number of classes, where labels are plain numbers and the data do not say.
        streaming: Read from start to end instead of by index; shards and Hub sets always are.
        shuffle_block: Rows of a stream that are held and shuffled at a time, per worker.
        stream_images: Images of one epoch of a stream, if it does not say.
        num_workers: Processes that decode and augment, per process; 0: none.
        max_corrupt: Share of unreadable images at which the run stops.
        allow_remote: Open pictures that rows of files or of a Hub set name elsewhere: other folders, URLs.
    """

    train: str
    test: str | None = None
    held_out: BelowOne = 0.0
    image_column: str | None = None
    label_column: str | None = None
    text_column: str | None = None
    num_classes: Width | None = None
    streaming: bool = False
    shuffle_block: Width = 2048
    stream_images: Count | None = None
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    max_corrupt: BelowOne = 0.01
    allow_remote: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CropAugment:
    """Random resized crop, as in OpenCLIP, with optional further steps.

    Attributes:
        scale: Range of the crop's area, as a share of the image.
        ratio: Range of width by height.
        hflip: Probability of a mirror image.
        rand_augment: timm's configuration of RandAugment, such as "rand-m9-mstd0.5-inc1".
        erasing: Probability that a rectangle is erased.
        repeats: Times that each image of an epoch is drawn anew (repeated augmentation).
    """

    scale: Area = (0.9, 1.0)
    ratio: Ratio = (0.75, 4 / 3)
    hflip: Share = 0.0
    rand_augment: str | None = None
    erasing: Share = 0.0
    repeats: Count = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ThreeAugment:
    """DeiT-III's 3-Augment: a crop, a mirror image, one of grey, solarisation and blur, and colour jitter.

    Source: deit/augment.py, `new_data_aug_generator`.

    Attributes:
        crop: "rrc" cuts 8 to 100 % of the area; "src" resizes the shorter side and cuts a square at random (with a
            margin of 4 reflected pixels).
        color_jitter: Of brightness, contrast and saturation.
        hflip: Probability of a mirror image.
        repeats: Times that each image of an epoch is drawn anew (repeated augmentation).
    """

    crop: Literal["rrc", "src"] = "rrc"
    color_jitter: NotNegative = 0.3
    hflip: Share = 0.5
    repeats: Count = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiCrop:
    """DINOv2's two global and several local crops.

    Upstream passes its blur probabilities to torchvision inverted, and trained the released models that way. The
    probabilities here are those that take effect. Source: dinov2/data/augmentations.py and transforms.py:17-21;
    facebookresearch/dinov2#411.

    Attributes:
        local_size: Side of the local crops in pixels; the global ones have the model's `img_size`.
        num_local: Local crops of each image.
        global_scale: Range of a global crop's area, as a share of the image.
        local_scale: The same of a local crop.
        ratio: Range of width by height.
        hflip: Probability of a mirror image.
        color_jitter: Probability of jitter (brightness .4, contrast .4, saturation .2, hue .1).
        gray: Probability of grey.
        blur: Probability of blur in the first global, the second global and the local crops.
        solarize: Probability of solarisation in the second global crop.
    """

    local_size: Side = 96
    num_local: Annotated[int, Field(ge=0, le=1000)] = 8
    global_scale: Area = (0.32, 1.0)
    local_scale: Area = (0.05, 0.32)
    ratio: Ratio = (0.75, 4 / 3)
    hflip: Share = 0.5
    color_jitter: Share = 0.8
    gray: Share = 0.2
    blur: tuple[Share, Share, Share] = (0.0, 0.9, 0.5)
    solarize: Share = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSettings:
    """The optimiser and its schedules. Rates and decay follow a cosine; the rate has a linear warm-up before it.

    Attributes:
        opt: timm's name of the optimiser.
        lr: Peak learning rate.
        lr_batch: Number of images that `lr` is meant for: it is scaled by the square root of the global batch over this
            number. None: it is not scaled.
        min_lr: Where the cosine ends.
        warmup_epochs: Epochs of warm-up.
        warmup_lr: Where the warm-up starts.
        weight_decay: Decoupled, at the start.
        weight_decay_end: At the end; None: the same.
        decay_rule: Which parameters decay. "timm": all but vectors, positions, class token and registers. "dinov2": all
            but biases, norms and LayerScale. "openclip": as "timm", but not the logit scale.
        betas: For Adam and similar optimisers; None: the optimiser's own, or none.
        eps: For Adam and similar optimisers; None: the optimiser's own.
        layer_decay: Factor of the rate from each layer to the one below.
        patch_embed_lr: Factor of the rate of the patch embedding.
        clip: Largest norm of the gradients; None: they are not clipped.
        clip_per_module: Whether the backbone and each head are clipped separately.
    """

    opt: str = "adamw"
    lr: NotNegative
    lr_batch: Count | None = None
    min_lr: NotNegative = 0.0
    warmup_epochs: Epochs = 0
    warmup_lr: NotNegative = 0.0
    weight_decay: NotNegative = 0.05
    weight_decay_end: NotNegative | None = None
    decay_rule: DecayRule = "timm"
    betas: tuple[BelowOne, BelowOne] | None = (0.9, 0.999)
    eps: NotNegative | None = None
    layer_decay: Positive = 1.0
    patch_embed_lr: NotNegative = 1.0
    clip: Positive | None = None
    clip_per_module: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleSettings:
    """How the work is distributed. Only `accumulate` changes what is learnt, apart from rounding.

    Attributes:
        precision: Number type of the forward pass; weights and optimiser stay in float32.
        accumulate: Parts into which a process divides each step, one after the other. Losses over the global batch
            (contrastive, Sinkhorn, KoLeo) see one part of every process at a time and so change.
        sharding: "ddp" copies the weights to every process, "fsdp2" shards weights, gradients and optimiser.
        checkpointing: Whether activations are recomputed in the backward pass instead of kept.
        compile: Whether the blocks are compiled by torch.compile.
    """

    precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: Count = 1
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSettings:
    """What is logged, evaluated and saved during the run.

    Attributes:
        log_every: Steps between lines of metrics.
        eval_every: Steps between evaluations (the task's scores, k-NN accuracy, artifacts); 0: only at the end; None:
            an epoch. There is always one before the first step.
        patience: Evaluations in a row without a better score after which the run ends; 0: it never ends early.
        save_every: Steps between checkpoints; 0: only at the end; None: an epoch.
        keep: Number of checkpoints to keep.
        trackers: accelerate's trackers by name: tensorboard, wandb, trackio, ...; JSONL is always written.
        eval_images: Number of held-out images to evaluate, and of training images that k-NN compares them with.
        knn_neighbors: Neighbours of the k-NN classifier. Source: dinov2/eval/knn.py.
        knn_temperature: Temperature of its votes. Source: the same.
        artifact_images: Images for the artifact telemetry; 0: none.
        cutoff: Norm above which a patch token is an outlier; None: found from the norms.
    """

    log_every: Count = 10
    eval_every: Amount | None = 0
    patience: Amount = 0
    save_every: Amount | None = 0
    keep: Count = 2
    trackers: tuple[str, ...] = ()
    eval_images: Amount = 2048
    knn_neighbors: Count = 20
    knn_temperature: Positive = 0.07
    artifact_images: Annotated[int, Field(ge=0, le=10_000)] = 64
    cutoff: Positive | None = None


Augment = CropAugment | ThreeAugment | MultiCrop


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All settings of one run.

    Attributes:
        name: Name of the recipe.
        model: The network.
        task: The objective.
        data: The images.
        augment: The augmentation.
        optim: The optimiser.
        scale: How the work is distributed.
        watch: What is logged, evaluated and saved.
        batch_size: Images of one step, over all processes and accumulated parts.
        epochs: Passes over the training images.
        epoch_steps: Steps that count as an epoch; None: one pass over the data.
        seed: Of everything that is random.
        license: SPDX identifier of the weights' license, given by the user. None: the license of start and teacher, or
            without either the one that this package gives to its own recipes on their own images.
    """

    name: str
    model: ModelSettings
    task: TaskSettings
    data: DataSettings
    augment: Augment
    optim: OptimSettings
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    batch_size: Width
    epochs: Annotated[Epochs, Field(gt=0)]
    epoch_steps: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    license: str | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions with a RecipeError."""
        if problem := next(_problems(self), None):
            raise RecipeError(f"recipe {self.name}: {problem}")


def require_start(recipe: Recipe) -> None:
    """Refuse to begin the second stage of a run without the first.

    Raises:
        RecipeError: The recipe needs a start and has none.
    """
    if recipe.model.start_required and recipe.model.start is None:
        raise RecipeError(
            f"recipe {recipe.name} goes on with a trained model: give model.start, a bundle's folder, hf-hub:org/name, "
            "or an architecture with a tag."
        )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The settings as JSON-safe nested dictionaries, without the kinds of `task` and `augment`."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; empty groups count as values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if value and isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _problems(recipe: Recipe) -> Iterator[str]:
    """Yield values out of range, and contradictions; those with the number of processes are found later."""
    yield from _out_of_range(recipe)
    task, augment = recipe.task, recipe.augment
    model, watch = recipe.model, recipe.watch
    if not TRAINABLE.fullmatch(model.trainable):
        yield f"model.trainable is {model.trainable!r}, give all, head, last:N, lora, registers or registers+norms."
    if model.arch is None and model.start is None and not model.start_required:
        yield "model.arch is null, and there is no model.start whose architecture could be taken: give one of them."
    if model.arch is not None and model.registers is not None:
        yield f"model.arch {model.arch} has its number of registers: leave model.registers, or model.arch, at null."
    if watch.patience and watch.eval_every == 0:
        yield f"watch.patience is {watch.patience}, but watch.eval_every is 0: evaluate every so many steps."
    if task.multi_crop != isinstance(augment, MultiCrop):
        yield (
            f"task {type(task).__name__} does not go with {type(augment).__name__}: a task that compares several crops "
            "of an image needs MultiCrop, and no other takes it."
        )
    yield from task.problems(batch_size=recipe.batch_size)
    if model.trainable == "lora" and (recipe.scale.sharding == "fsdp2" or recipe.scale.compile):
        yield "model.trainable lora goes without scale.sharding fsdp2 and scale.compile: leave them out."


def _out_of_range(settings: Any, prefix: str = "") -> Iterator[str]:
    """Yield values that their types do not allow."""
    for known in dataclasses.fields(settings):
        name, value = f"{prefix}{known.name}", getattr(settings, known.name)
        if dataclasses.is_dataclass(value):
            yield from _out_of_range(value, f"{name}.")
            continue
        if isinstance(value, str) and NO_TEXT.search(value):
            yield f"{name} is {shown(value)}, give a text of UTF-8 without zero bytes."
        try:
            _allowed(type(settings), known.name).validate_python(value)
        except ValidationError as error:
            yield f"{name} is {shown(value)}, give {wanted(error.errors(include_url=False)[0])}."


@cache
def _allowed(group: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(group, include_extras=True)[name])
