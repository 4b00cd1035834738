"""Where weights came from: common facts, what made the weights, and what was measured of them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AliasPath, Field

from vitreg_hub.errors import BundleError
from vitreg_hub.licenses import UNKNOWN
from vitreg_hub.objectives import Objective
from vitreg_hub.typed import read

CALLED = "vitreg.provenance"
"""Its key in a config.json."""
PARTS = ("model", "task", "data", "augment", "optim", "watch")
"""The parts of a recipe that are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """A checkpoint became a bundle.

    Attributes:
        source: File or folder, without the path to it, or repository with its commit.
        sha256: Checksum of every weights file.
        num_mapped: Tensors of the source that the bundle holds.
        dropped: Tensors that it does not hold, by reason.
        network: Facts that no tensor shows, as the bundle has them.
        untrained_registers: Registers that were drawn at random.
        measured: Largest absolute difference to a reference implementation by output, and its name under "reference";
            empty if it was not measured.
    """

    kind: Literal["conversion"] = "conversion"
    source: str
    sha256: Mapping[str, str]
    format: str
    arch: str
    num_mapped: int
    dropped: Mapping[str, tuple[str, ...]]
    network: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None
    notes: tuple[str, ...] = ()
    untrained_registers: int = 0
    measured: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def differences(self) -> dict[str, float]:
        """The numbers of `measured`."""
        return {name: value for name, value in self.measured.items() if not isinstance(value, str)}

    def __str__(self) -> str:
        """The table that the terminal shows."""
        rows = [("source", self.source)]
        rows += [("sha256", f"{digest}  {name}") for name, digest in self.sha256.items()]
        rows += [("format", self.format), ("architecture", self.arch), ("mapped", f"{self.num_mapped} tensors")]
        for why, names in self.dropped.items():
            more = f", ... {len(names) - 3} more" if len(names) > 3 else ""
            rows.append(("dropped", f"{len(names)} ({', '.join(names[:3])}{more}): {why}"))
        rows.append(("network", ", ".join(f"{name} {value}" for name, value in self.network.items())))
        rows.append(("license", self.license or UNKNOWN))
        rows += [("note", note) for note in self.notes]
        for name, value in self.differences.items():
            rows.append(("difference", f"{value:.2g} in {name}, to {self.measured['reference']}"))
        if not self.differences:
            why = self.measured.get("reference", "--verify compares with a reference implementation")
            rows.append(("difference", f"not measured ({why})"))
        return "\n".join(f"{key.ljust(13)}{value}" for key, value in rows)


def _at(part: str, name: str) -> Any:
    return Field(validation_alias=AliasPath(part, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeFacts:
    """The settings of a recipe that cards and tables show, from `PARTS`; older bundles lack some of them.

    Attributes:
        task: The objective, by the name of its settings' class.
        lr: Peak learning rate, for `lr_batch` images.
    """

    name: str | None = None
    batch_size: int | None = None
    seed: int | None = None
    start: Annotated[str | None, _at("model", "start")] = None
    trainable: Annotated[str, _at("model", "trainable")] = "all"
    task: Annotated[str | None, _at("task", "kind")] = None
    teacher: Annotated[str | None, _at("task", "teacher")] = None
    smoothing: Annotated[float, _at("task", "smoothing")] = 0.0
    mixup: Annotated[float, _at("task", "mixup")] = 0.0
    cutmix: Annotated[float, _at("task", "cutmix")] = 0.0
    ema: Annotated[float | None, _at("task", "ema")] = None
    publish: Annotated[str, _at("task", "publish")] = "averaged"
    train: Annotated[str | None, _at("data", "train")] = None
    test: Annotated[str | None, _at("data", "test")] = None
    held_out: Annotated[float, _at("data", "held_out")] = 0.0
    augment: Annotated[str | None, _at("augment", "kind")] = None
    opt: Annotated[str | None, _at("optim", "opt")] = None
    lr: Annotated[float | None, _at("optim", "lr")] = None
    lr_batch: Annotated[int | None, _at("optim", "lr_batch")] = None
    weight_decay: Annotated[float | None, _at("optim", "weight_decay")] = None
    weight_decay_end: Annotated[float | None, _at("optim", "weight_decay_end")] = None
    eval_images: Annotated[int | None, _at("watch", "eval_images")] = None
    knn_neighbors: Annotated[int | None, _at("watch", "knn_neighbors")] = None
    knn_temperature: Annotated[float | None, _at("watch", "knn_temperature")] = None
    artifact_images: Annotated[int, _at("watch", "artifact_images")] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOfRun:
    """A model that a run went on from or learned from.

    Attributes:
        name: Without the machine's folders.
        sha256: Of its weights; None if they are not in one file.
    """

    name: str
    license: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """A run of a recipe.

    Attributes:
        recipe: All settings, nested as in `recipe.yaml`: what a second run would need.
        objective: What it trained for; None where an older bundle does not tell.
        start_score: The objective's score of the weights that it began with, if it was measured.
        evaluated: On how many images the metrics were measured.
        sources: Start and teacher, by the setting that names each.
    """

    kind: Literal["training"] = "training"
    recipe: Mapping[str, Any]
    objective: Objective | None = None
    step: int | None = None
    total_steps: int | None = None
    start_score: float | None = None
    evaluated: int | None = None
    sources: Mapping[str, SourceOfRun] = field(default_factory=dict)

    @property
    def facts(self) -> RecipeFacts:
        """The settings that cards and tables show.

        Raises:
            BundleError: The recipe cannot be read.
        """
        called = f"{CALLED}.made.recipe"
        for part in PARTS:
            read(dict[str, Any], self.recipe.get(part, {}), called=f"{called}.{part}", error=BundleError)
        return read(RecipeFacts, self.recipe, called=called, error=BundleError, unknown="ignore")


@dataclass(frozen=True, kw_only=True, slots=True)
class Transformation:
    """A bundle became another one without training: `what` says in a sentence what was done to `source`."""

    kind: Literal["transformation"] = "transformation"
    source: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """Weights that this package did not make, and what their maker recorded, in any form."""

    kind: Literal["foreign"] = "foreign"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMass:
    """Where the attention of one token goes, mean over heads and images; the four shares sum to 1.

    The token is "class", "class 2", "register 1", ...; patches are normal or outliers.
    """

    source: str
    to_class: float
    to_registers: float
    to_normal: float
    to_outliers: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactSummary:
    """What a bundle keeps of an artifact report.

    Attributes:
        verdict: What the norms say, in a sentence or two.
        images: Name of the images, without the machine's folders.
        image_size: Height and width in pixels.
        block: Block (from 0) whose attention was looked at.
        outlier_fraction: Share of patch tokens that are outliers, per block.
        cutoff: Norm above which a patch token of `block` is one; None if there are none.
        attention: In `block`, per class token and register.
    """

    verdict: str
    images: str
    num_images: int
    image_size: tuple[int, int]
    block: int
    outlier_fraction: tuple[float, ...]
    cutoff: float | None = None
    attention: tuple[AttentionMass, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BestModel:
    """The score by which weights are the best of their run, and their step."""

    score: str
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where weights came from.

    Attributes:
        origin: One sentence.
        license: SPDX identifier, in the Hub's lower-case spelling.
        dataset: What they were trained or measured on.
        metrics: Measured figures by name, shares in [0, 1].
        best: Why they are the best of their run, if they were bundled as such.
        doors: Largest absolute difference of outputs, by door, as `doors.verify` found it.
        command: Without the machine's folders.
        commit: Of this package's source.
        created: In UTC (ISO 8601).
        seconds: Wall time.
    """

    origin: str
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    made: Annotated[Conversion | TrainingRun | Transformation | Foreign, Field(discriminator="kind")] = Foreign()
    best: BestModel | None = None
    artifacts: ArtifactSummary | None = None
    doors: Mapping[str, float] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    created: str | None = None
    hardware: str | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @property
    def conversion(self) -> Conversion | None:
        """What made the weights, if that was a conversion."""
        return self.made if isinstance(self.made, Conversion) else None

    @property
    def run(self) -> TrainingRun | None:
        """What made the weights, if that was a training run."""
        return self.made if isinstance(self.made, TrainingRun) else None


def provenance_to_json(provenance: Provenance) -> dict[str, Any]:
    """The entry of a config.json, as `json` reads it back, without what was not recorded."""
    entry = json.loads(json.dumps(dataclasses.asdict(provenance)))
    return {key: value for key, value in entry.items() if value is not None}


def provenance_from_json(data: Any) -> Provenance:
    """Read the entry of a config.json, of any age.

    Raises:
        BundleError: Something in it is unknown or of the wrong type; the message names the keys.
    """
    entry = read(dict[str, Any], data, called=CALLED, error=BundleError)
    provenance = read(Provenance, migrate(entry), called=CALLED, error=BundleError)
    _ = provenance.run and provenance.run.facts  # refuses a recipe that cannot be read
    return provenance


def migrate(data: Mapping[str, Any]) -> dict[str, Any]:
    """Bring an entry of the first form, which had everything in `settings`, into today's form.

    Raises:
        BundleError: The settings are not an object.
    """
    if "made" in data or "settings" not in data:
        return dict(data)
    rest = {key: value for key, value in data.items() if key != "settings"}
    settings = read(dict[str, Any], data["settings"], called=f"{CALLED}.settings", error=BundleError)
    measured = {key: settings.pop(key) for key in ("best", "artifacts", "doors") if key in settings}
    if "conversion" in settings:  # which had no other settings
        report = read(dict[str, Any], settings["conversion"], called=f"{CALLED}.settings.conversion", error=BundleError)
        made = {"kind": "conversion"} | report
    elif settings.keys() & {"optim", "opt"}:
        made = _run(settings)
    else:
        made = {"kind": "foreign", "settings": settings}
    return rest | measured | {"made": made}


def _run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A training run, from a recipe that has the run's own figures among its settings."""
    own = {key: settings[key] for key in ("step", "total_steps", "sources") if key in settings}
    recipe = {key: value for key, value in settings.items() if key not in own}
    if "optim" not in recipe:  # the first recipes were flat
        recipe["optim"] = {key: recipe.pop(key) for key in ("opt", "lr", "weight_decay") if key in recipe}
    if isinstance(data := recipe.get("data"), Mapping) and "evaluated" in data:
        recipe["data"] = {key: value for key, value in data.items() if key != "evaluated"}
        own["evaluated"] = data["evaluated"]
    return {"kind": "training", "recipe": recipe} | own
