"""What an evaluation found: typed, frozen, and the same as JSON."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.interventions import Intervention
from vitreg_hub.typed import read

FORM = 1
"""Version of report.json; a reader refuses others."""

Protocol = Literal["classify", "knn", "linear", "logreg", "zero-shot", "segmentation", "depth", "discovery"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

Setting = str | int | float | bool | None | tuple[str | int | float | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number.

    Attributes:
        name: What was counted, such as "top-1 of 20 neighbours".
        value: A share in [0, 1], or in `unit`.
        low: Lower end of the 95 % interval, where one is known.
        high: Its upper end.
        unit: "share", "m", or empty for a plain number.
        higher_is_better: Whether more is better.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: Literal["share", "m", ""] = "share"
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFacts:
    """Images that were used.

    Attributes:
        name: As they were given, with the split.
        num_images: How many.
        classes: Names of the classes, or their numbers.
    """

    name: str
    num_images: int
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ProtocolResult:
    """What one protocol found of one model.

    Attributes:
        protocol: Which.
        train: Images that were learned from; None where nothing was.
        test: Images that were scored.
        settings: Everything else on which the numbers depend.
        scores: The first is the one to quote.
        interventions: The same scores of the same images with the registers changed.
        per_class: Score of each class of the test images; None for a class without images.
        confusion: Counts [true class][class told], where classes were told.
        table: Further numbers by name, such as those of a grid from which the best was taken.
        notes: What a reader must know, in sentences.
    """

    protocol: Protocol
    train: DataFacts | None = None
    test: DataFacts
    settings: dict[str, Setting]
    scores: tuple[Score, ...]
    interventions: dict[Intervention, tuple[Score, ...]] = field(default_factory=dict)
    per_class: tuple[float | None, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A short hash of protocol, data and settings: numbers with the same one can be compared."""
        told = [self.protocol, self.train and asdict(self.train), asdict(self.test), self.settings]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedModel:
    """The model that was scored.

    Attributes:
        name: As it was given, or the class of a module.
        num_params: Parameters of the network.
        num_registers: Registers.
        img_size: Height and width of its images in pixels, where they are known.
        preprocessing: Of the images, in words.
    """

    name: str
    num_params: int
    num_registers: int
    img_size: tuple[int, int] | None
    preprocessing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalReport:
    """The scores of one model.

    Attributes:
        model: What was scored.
        results: In the order of `PROTOCOLS`.
        notes: Why a protocol is missing, and the like.
        versions: Of the libraries.
        command: That was run, if it was one.
        date: When, as ISO 8601 writes it.
        device: On what hardware, in words.
    """

    model: EvaluatedModel
    results: tuple[ProtocolResult, ...]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    date: str | None = None
    device: str | None = None

    def result(self, protocol: Protocol) -> ProtocolResult | None:
        """What one protocol found, if it ran."""
        return next((result for result in self.results if result.protocol == protocol), None)


def to_json(reports: Sequence[EvalReport]) -> str:
    """The text of report.json. Each result also tells its digest, for readers of the file."""
    told: list[dict[str, Any]] = [asdict(report) for report in reports]
    for entry, report in zip(told, reports, strict=True):
        for row, result in zip(entry["results"], report.results, strict=True):
            row["digest"] = result.digest
    return json.dumps({"evaluation": FORM, "reports": told}, indent=1) + "\n"


def load_reports(path: str | os.PathLike[str]) -> tuple[EvalReport, ...]:
    """Read report.json.

    Raises:
        DataError: It cannot be read, or is none of ours.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as an evaluation's report.json: {error}.") from error
    if not isinstance(data, Mapping) or data.get("evaluation") != FORM or not isinstance(data.get("reports"), list):
        raise DataError(
            f"{path} is no report.json of an evaluation in form {FORM}: give one that `vitreg evaluate` wrote."
        )
    for report in data["reports"]:
        for row in report.get("results", ()) if isinstance(report, dict) else ():
            if isinstance(row, dict):
                row.pop("digest", None)
    return read(tuple[EvalReport, ...], data["reports"], called=f"{path}", error=DataError)
