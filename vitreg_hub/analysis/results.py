"""What an analysis found: typed, frozen, and the same as JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from vitreg_hub.bundle.provenance import AttentionMass
from vitreg_hub.errors import DataError
from vitreg_hub.typed import read

FORM = 1
"""Version of report.json; a reader refuses others."""

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Shares below which norms are reported; the first and the last are the exact smallest and largest norm."""


BINS_PER_OCTAVE = 64
"""Bins of a histogram of norms for each power of 2: a bin is 1.1 % wide."""
SMALLEST, LARGEST = -16, 24
"""Powers of 2 between which norms are distinguished; those outside fall into the first or the last bin."""
NUM_BINS = (LARGEST - SMALLEST) * BINS_PER_OCTAVE


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """The model that was analysed.

    Attributes:
        name: As it was given, or the class of a module.
        num_params: Parameters of the network, without any wrapper around it.
        depth: Number of blocks.
        embed_dim: Channels of a token.
        num_class_tokens: 0, 1, or 2 with a distillation token.
        num_registers: Registers of the model.
        patch_size: Height and width of a patch in pixels.
        step: Training step of a checkpoint, if known.
    """

    name: str
    num_params: int
    depth: int
    embed_dim: int
    num_class_tokens: int
    num_registers: int
    patch_size: tuple[int, int]
    step: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """The images that the model saw.

    Attributes:
        name: As they were given.
        num_images: Number of images.
        size: Height and width in pixels, after the model's preprocessing.
        grid: Rows and columns of patches.
        preprocessing: In words; "given as tensors" where there was none.
    """

    name: str
    num_images: int
    size: tuple[int, int]
    grid: tuple[int, int]
    preprocessing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NormHistogram:
    """Counts of token norms in bins that have the same width in log2, for every model (`histogram.py`).

    Attributes:
        first_bin: Index of the first bin that holds anything.
        counts: Tokens per bin from there on.
    """

    first_bin: int
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutoff:
    """The norm above which a patch token of one block is an outlier.

    Attributes:
        value: The norm; None if there are no outliers.
        source: "given", "found" (between two modes), or "none" where there are no outliers.
        why: The reason in words.
        separation: Ashman's D of the two modes on log norms, where the cutoff was found.
        outlier_weight: Share of the tokens in the upper mode.
        normal_norm: Norm at the centre of the lower mode.
        outlier_norm: Norm at the centre of the upper mode.
        gap: Largest norm below the cutoff and smallest above it, to the width of a bin; None if a side is empty.
    """

    value: float | None
    source: str
    why: str
    separation: float | None = None
    outlier_weight: float | None = None
    normal_norm: float | None = None
    outlier_norm: float | None = None
    gap: tuple[float, float] | None = None

    @property
    def norm(self) -> float:
        """The norm as one that can be compared with: infinite if there are no outliers."""
        return math.inf if self.value is None else self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNorms:
    """Norms of the tokens after one block, before the final norm.

    Attributes:
        histogram: Of all patch tokens.
        quantiles: Norms of patch tokens at `QUANTILES`.
        mean: Mean norm of patch tokens.
        cutoff: What makes a patch token an outlier.
        outlier_fraction: Share of patch tokens above the cutoff.
        class_norms: Mean norm of each class token.
        register_norms: Mean norm of each register.
    """

    histogram: NormHistogram
    quantiles: tuple[float, ...]
    mean: float
    cutoff: Cutoff
    outlier_fraction: float
    class_norms: tuple[float, ...]
    register_norms: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Norm at one of `QUANTILES`."""
        return self.quantiles[QUANTILES.index(share)]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierPlaces:
    """Where outliers of one block are.

    Attributes:
        per_position: [rows][columns] share of the images in which the patch at that place is an outlier.
        per_image: How many images have 0, 1, 2, ... outliers.
        interval: Between which the share of outliers lies in 95 % of the samples of pictures that are drawn from these
            ones with replacement; None without outliers, and in reports of older versions.
        num_pictures: How many pictures there are; tiles of one are not told apart.
    """

    per_position: tuple[tuple[float, ...], ...]
    per_image: tuple[int, ...]
    interval: tuple[float, float] | None = None
    num_pictures: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarities:
    """Cosine similarities of patches to their neighbours.

    Attributes:
        num_patches: Patches in this group.
        mean: Mean similarity.
        counts: Patches per bin; the bins divide [-1, 1] equally.
    """

    num_patches: int
    mean: float
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Redundancy:
    """How similar patches are to their neighbours; `outlier` is None where there are no outliers."""

    normal: Similarities | None
    outlier: Similarities | None


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalProbe:
    """What linear probes find out from the tokens of one group about their own place and pixels.

    Attributes:
        num_train: Tokens that the probes were fitted to.
        num_test: Tokens, of other images, that they were scored on.
        position_accuracy: Share of tokens whose place is found exactly.
        position_distance: Mean Euclidean distance between the place found and the true one, in patches.
        pixel_error: Mean L2 norm of the difference between a patch and its reconstruction, in normalised pixel values.
        chance_accuracy: `position_accuracy` of the best constant answer.
        chance_distance: `position_distance` of the best constant answer.
        chance_error: `pixel_error` of the mean patch.
    """

    num_train: int
    num_test: int
    position_accuracy: float
    position_distance: float
    pixel_error: float
    chance_accuracy: float
    chance_distance: float
    chance_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalInformation:
    """Probes of both groups, fitted to equally many tokens; None, and why, for a group that has too few."""

    normal: LocalProbe | None
    outlier: LocalProbe | None
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenAccuracy:
    """How well images are classified from one kind of token alone, by logistic regression."""

    token: str
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalInformation:
    """Image classification from one token.

    Attributes:
        tokens: Accuracy by token: "class", "normal patch", "outlier patch", "register 1", ...
        num_classes: Classes in the test images.
        num_train: Images that each regression was fitted to.
        num_test: Images that it was scored on.
        chance: Accuracy of always answering the most frequent training class.
        why_not: Why there is no result, or why a token is missing.
    """

    tokens: tuple[TokenAccuracy, ...]
    num_classes: int
    num_train: int
    num_test: int
    chance: float | None
    why_not: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """What one image looks like inside a model, for pictures. Rows and columns are those of the grid of patches.

    Attributes:
        image: [height, width, 3] in [0, 1].
        norms: [rows, columns] norms of the patch tokens, before the final norm.
        outliers: [rows, columns] bool, which of them are outliers.
        class_attention: [heads, rows, columns] from the class token to the patches; None without a class token.
        register_attention: [R, heads, rows, columns] from each register to the patches; R = 0 without registers.
        components: [rows, columns, 3] in [0, 1], the first principal components as colours (`pca_maps`).
    """

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}  # not stored as JSON

    image: np.ndarray
    norms: np.ndarray
    outliers: np.ndarray
    class_attention: np.ndarray | None
    register_attention: np.ndarray
    components: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactReport:
    """Everything the analysis measured of one model on one set of images. Per-block tuples have one entry per block.

    Attributes:
        model: The model.
        images: The images.
        block: Block (from 0) whose outliers are located, probed and attended to.
        blocks: Norms after each block.
        places: Where the outliers of `block` are.
        redundancy: Similarity to neighbours right after the patch embedding, outliers of `block` against others.
        local_information: Probes for position and pixels, on tokens of the last block after the final norm.
        global_information: Classification from one token, on tokens of the last block after the final norm.
        attention: Attention mass in `block`, per class token and register.
        notes: What a reader should know, in sentences.
        versions: Libraries that made it.
        examples: Maps of some images, for figures; not stored as JSON.
    """

    model: ModelFacts
    images: ImageFacts
    block: int
    blocks: tuple[BlockNorms, ...]
    places: OutlierPlaces
    redundancy: Redundancy
    local_information: LocalInformation
    global_information: GlobalInformation
    attention: tuple[AttentionMass, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    examples: tuple[Example, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be drawn, which a damaged file may hold."""
        model, (rows, columns) = self.model, self.images.grid
        if not (
            len(self.blocks) == model.depth > self.block >= 0
            and max(model.num_params, model.step or 0, rows * columns, sum(self.places.per_image)) < 2**53
            and [len(row) for row in self.places.per_position] == [columns] * rows
            and all(
                len(block.quantiles) == len(QUANTILES)
                and (len(block.class_norms), len(block.register_norms)) == (model.num_class_tokens, model.num_registers)
                and 0 <= block.histogram.first_bin <= NUM_BINS - len(block.histogram.counts)
                for block in self.blocks
            )
        ):
            raise DataError(f"the numbers of the report of {model.name} contradict each other: analyze it again.")

    @property
    def chosen(self) -> BlockNorms:
        """Norms after `block`."""
        return self.blocks[self.block]

    @property
    def outlier_fraction(self) -> tuple[float, ...]:
        """Share of patch tokens that are outliers, per block."""
        return tuple(block.outlier_fraction for block in self.blocks)

    @property
    def cutoff(self) -> tuple[float | None, ...]:
        """Norm above which a patch token is an outlier, per block; None where there are none."""
        return tuple(block.cutoff.value for block in self.blocks)

    @property
    def first_outlier_block(self) -> int | None:
        """First block (from 0) that has outliers."""
        return next((i for i, share in enumerate(self.outlier_fraction) if share), None)


def to_json(reports: Sequence[ArtifactReport]) -> str:
    """Text of a report.json: all that was measured, without pictures."""
    derived = [{"outlier_fraction": r.outlier_fraction, "first_outlier_block": r.first_outlier_block} for r in reports]
    stored = [asdict(replace(r, examples=())) | more for r, more in zip(reports, derived, strict=True)]
    content = {"form": FORM, "reports": stored}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def load_reports(file: str | Path) -> tuple[ArtifactReport, ...]:
    """Read a report.json.

    Raises:
        DataError: It is not one, or has another version.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        raise DataError(f"{file} is not an ordinary file: give the report.json of `vitreg analyze`.")
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        form, reports = content["form"], content["reports"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a report of `vitreg analyze` ({error}): give its report.json.") from error
    if form != FORM:
        raise DataError(f"{file} has form {form!r}, this reads form {FORM}: analyze the models again.")
    return read(tuple[ArtifactReport, ...], reports, called=f"{file}: reports", error=DataError, unknown="ignore")
