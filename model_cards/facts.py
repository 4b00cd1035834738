"""Facts about a bundle that several parts of its card need: output, scores, and the images behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from vitreg_hub.arch import get_arch
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import RecipeFacts, TrainingRun
from vitreg_hub.environment import without_folders
from vitreg_hub.errors import printable
from vitreg_hub.images.data_sets import ON_HUB
from vitreg_hub.images.embedded import TRAINING_SETS
from vitreg_hub.names import HUB_PREFIX
from vitreg_hub.objectives import OBJECTIVES, SCORES, Objective, Score

CLIP_FAMILIES = ("clip", "clip_quickgelu")
CLIP_FORMATS = ("openclip", "openclip-timm", "openai", "hf-clip")
"""Of conversions, whose network can be of any family."""
SOURCES = {
    "digits": "scikit-learn's load_digits: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository",
    "photos": "tiles of pictures in scikit-learn and scikit-image, see vitreg_hub/images/embedded.py",
    "scenes": "drawn by vitreg_hub/images/scenes.py",
}
"""Where the embedded data sets come from."""
CUSTOM = "custom"
"""The identifier of data that are not on the Hub, in a model-index."""
KEPT_TOWER = "text tower; kept beside the bundle, in open_clip's own form"
"""Why the text tower is not in the bundle, in the report of a conversion that keeps it."""
LOGITS, EMBEDDINGS, FEATURES = "logits", "embeddings", "features"


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """Images that something was measured on.

    Attributes:
        name: Without a machine's folders.
        dataset: Identifier on the Hub, or name of an embedded set; otherwise `CUSTOM`.
    """

    name: str
    dataset: str
    split: str | None = None
    words: str


def output(bundle: ModelBundle) -> str:
    """A model's output: logits of classes, embeddings in a space shared with texts, or bare features.

    timm counts the width of either head as classes. A CLIP model's head is a projection, unless it has names of classes
    or was trained here, where a head always classifies.
    """
    if not bundle.num_classes:
        return FEATURES
    run, conversion = bundle.provenance.run, bundle.provenance.conversion
    if bundle.label_names or run:
        return LOGITS
    of_clip = get_arch(bundle.arch).family in CLIP_FAMILIES or (conversion and conversion.format in CLIP_FORMATS)
    return EMBEDDINGS if of_clip else LOGITS


def scores(bundle: ModelBundle) -> list[tuple[str, float]]:
    """Metrics and their values, by name: JSON does not keep their order."""
    return sorted(bundle.provenance.metrics.items())


def objective_of(run: TrainingRun | None) -> Objective | None:
    """What a run trained for, as far as it or the kind of its task tells."""
    return run and (run.objective or OBJECTIVES.get(run.facts.task or ""))


def score_of(bundle: ModelBundle, metric: str) -> Score | None:
    """What is known of a metric of a bundle."""
    objective = objective_of(bundle.provenance.run)
    own = {objective.score.name: objective.score} if objective else {}
    return (SCORES | own).get(metric)


def in_words(bundle: ModelBundle, metric: str) -> str:
    """What people call a metric of a bundle."""
    score = score_of(bundle, metric)
    return score.words if score else metric.replace("_", " ")


def measured_on(bundle: ModelBundle) -> Images | None:
    """The images of a bundle's metrics; None if they are unknown."""
    data = bundle.provenance.run.facts if bundle.provenance.run else RecipeFacts()
    held_out = data.test or (data.train if data.train in TRAINING_SETS else None)
    if held_out and held_out in TRAINING_SETS:
        return Images(name=held_out, dataset=held_out, split="test", words=f"the held-out part of {held_out}")
    told = held_out or bundle.provenance.dataset
    if not told:
        return None
    name = without_folders(told)
    if on_hub := on_the_hub(told):
        return Images(name=on_hub[0], dataset=on_hub[0], split=on_hub[1], words=name)
    words = f"the held-out part of {name}" if data.held_out and not held_out else name
    return Images(name=name, dataset=CUSTOM, words=words)


def on_the_hub(dataset: str) -> tuple[str, str | None] | None:
    """Identifier and split of data that are surely on the Hub: a bare ``org/name`` may also be a folder."""
    found = ON_HUB.fullmatch(dataset.removeprefix(HUB_PREFIX))
    return (found[1], found[2]) if found and (found[2] or dataset.startswith(HUB_PREFIX)) else None


def one_line(told: Any) -> Any:
    """A value with all its texts on one line, so that none can leave its place in a list or a table."""
    match told:
        case str():
            return " ".join(printable(told).split())
        case Mapping():
            return {one_line(key): one_line(value) for key, value in told.items()}
        case list() | tuple():
            return type(told)(map(one_line, told))
    if is_dataclass(told) and not isinstance(told, type):
        return replace(told, **{field.name: one_line(getattr(told, field.name)) for field in fields(told)})
    return told


def count(number: int, word: str) -> str:
    """A number with its noun, in the plural if needed."""
    if number != 1:
        word += "es" if word.endswith("ch") else "s"
    return f"{number:,} {word}"
