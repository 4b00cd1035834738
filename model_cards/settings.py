"""What a bundle's settings tell, as far as they have the form in which this package writes them.

A part that lacks a key or has a value of another kind reads as empty. All texts come on one line.
"""

from collections.abc import Mapping
from typing import Any

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import ARTIFACTS_KEY, BEST_KEY, CONVERSION_KEY, DOORS_KEY

NUMBER, TEXT_OR_NONE = int | float, str | None
RUN = {
    "name": str,
    "model": {"start": TEXT_OR_NONE, "trainable": str},
    "task": {"kind": str},
    "data": {"train": str},
    "augment": {"kind": str},
    "optim": {
        "opt": str,
        "lr": NUMBER,
        "lr_batch": int | None,
        "weight_decay": NUMBER,
        "weight_decay_end": NUMBER | None,
    },
    "batch_size": int,
    "seed": int,
    "step": int,
    "total_steps": int,
}
BEST = {"score": str, "step": int}
WATCH = {"eval_images": int, "knn_neighbors": int, "knn_temperature": NUMBER}
CONVERSION = {
    "source": str,
    "sha256": {str: str},
    "format": str,
    "num_mapped": int,
    "dropped": {str: [str]},
    "network": {str: object},
    "notes": [str],
    "measured": {str: object},
}
ARTIFACTS = {
    "verdict": str,
    "images": str,
    "num_images": int,
    "image_size": (int, int),
    "block": int,
    "outlier_fraction": [NUMBER],
    "attention": [{"source": str, "to_registers": NUMBER, "to_outliers": NUMBER}],
    "notes": [str],
}
DOORS = {str: NUMBER}


def run(bundle: ModelBundle) -> dict[str, Any]:
    """The recipe of a training run with its steps."""
    return _part(bundle.provenance.settings, RUN)


def best(bundle: ModelBundle) -> dict[str, Any]:
    """By which score, and after how many steps, these weights are the best of their run."""
    return _part(bundle.provenance.settings.get(BEST_KEY), BEST)


def watch(bundle: ModelBundle) -> dict[str, Any]:
    """How a run's scores were measured."""
    return _part(bundle.provenance.settings.get("watch"), WATCH)


def conversion(bundle: ModelBundle) -> dict[str, Any]:
    """The report of a conversion."""
    return _part(bundle.provenance.settings.get(CONVERSION_KEY), CONVERSION)


def artifacts(bundle: ModelBundle) -> dict[str, Any]:
    """The summary of an artifact report."""
    return _part(bundle.provenance.settings.get(ARTIFACTS_KEY), ARTIFACTS)


def doors(bundle: ModelBundle) -> dict[str, float]:
    """Largest absolute difference of outputs, by door."""
    return _part(bundle.provenance.settings.get(DOORS_KEY), DOORS)


def text(bundle: ModelBundle, part: str, key: str) -> str | None:
    """One text of a part of the settings, of whatever form the rest is."""
    value = _value(bundle, part, key)
    return one_line(value) if isinstance(value, str) else None


def number(bundle: ModelBundle, part: str, key: str) -> int:
    """One whole number, in the same way; 0 where there is none."""
    value = _value(bundle, part, key)
    return value if type(value) is int else 0


def _value(bundle: ModelBundle, part: str, key: str) -> Any:
    found = bundle.provenance.settings.get(part)
    return found.get(key) if isinstance(found, Mapping) else None


def one_line(told: str) -> str:
    """Text that cannot leave its place in a list or a table."""
    return " ".join(told.split())


def _part(found: Any, form: Mapping[Any, Any]) -> dict[Any, Any]:
    try:
        return _fitted(found, form)
    except TypeError:
        return {}


def _fitted(found: Any, form: Any) -> Any:
    """A value with its texts on one line.

    Args:
        found: The value.
        form: A type or a union of them. `[form]`: a list, each member of that form. `(form, ...)`: a list with so many
            members. `{key: form}`: an object, in which there may be other keys too. `{str: form}`: one with any keys.

    Raises:
        TypeError: It has another form.
    """
    match form, found:
        case dict(), Mapping() if str in form:
            return {_fitted(key, str): _fitted(value, form[str]) for key, value in found.items()}
        case dict(), Mapping():
            return dict(found) | {key: _fitted(found.get(key), kind) for key, kind in form.items()}
        case [kind], list() | tuple() if isinstance(form, list):
            return [_fitted(member, kind) for member in found]
        case tuple(), list() | tuple() if len(found) == len(form):
            return [_fitted(member, kind) for member, kind in zip(found, form, strict=True)]
    if isinstance(form, dict | list | tuple) or not isinstance(found, form):
        raise TypeError(f"{found!r} is not of the form {form!r}")
    return one_line(found) if isinstance(found, str) else found
