"""Classes of a model and of a data set, matched by name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.network.layout import unwrapped

UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls a class without a name."""
SYNSET = re.compile(r"n\d{8}")


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classes of a model's head, where it knows them.

    Those of ImageNet-1k weights of timm, which hold no names, are WordNet's ids.
    """
    network: Any = unwrapped(model)
    config = getattr(network, "config", None)
    if names := getattr(config, "id2label", None):
        known = tuple(str(names[index]) for index in sorted(names))
        return () if all(UNNAMED.fullmatch(name) for name in known) else known
    cfg = getattr(network, "pretrained_cfg", None) or {}
    names = cfg.get("label_names") or ()
    if names and len(names) == network.num_classes:  # not those of a head that was replaced
        return tuple(map(str, names))
    if getattr(network, "num_classes", 0) == 1000:
        return tuple(_imagenet().label_names())
    return ()


def in_words(name: str) -> str:
    """A class as people call it: WordNet's id of an ImageNet class comes after its words."""
    if SYNSET.fullmatch(name) and name in _imagenet().label_names():
        return f"{_imagenet().label_name_to_description(name)} ({name})"
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMatch:
    """Which class of a model is which class of the data.

    Attributes:
        places: For each class of the data, its number in the model, -1 where the model does not have it.
        how: In words.
    """

    places: tuple[int, ...]
    how: str

    def labels(self, labels: Tensor) -> Tensor:
        """Labels of the data as the model's, -1 for those it does not have."""
        return torch.tensor([*self.places, -1])[labels]


def match(model_names: Sequence[str], num_model: int, data_names: Sequence[str] | None, num_data: int) -> ClassMatch:
    """Match classes by name, as far as both have names; by number where there are as many.

    Args:
        model_names: From `class_names`; empty if they are not known.
        num_model: Classes of the model.
        data_names: Of the data, where they are known.
        num_data: Classes of the data.

    Raises:
        DataError: They have nothing in common.
    """
    ours, theirs = _places(model_names), list(data_names or ())
    places = tuple(next((ours[word] for word in _names_of(name) if word in ours), -1) for name in theirs)
    known = sum(place >= 0 for place in places)
    if known == len(theirs) > 0:
        return ClassMatch(places=places, how="by name")
    if num_model == num_data and not known:
        named = " whose names differ" if model_names and theirs else ""
        return ClassMatch(places=tuple(range(num_data)), how=f"by number: {num_data} classes{named}")
    if known:
        missing = [name for name, place in zip(theirs, places, strict=True) if place < 0]
        return ClassMatch(places=places, how=f"by name, without {len(missing)} that the model lacks, as {missing[0]!r}")
    raise DataError(
        f"the model tells {num_model} classes{_such_as(model_names)}, the data have {num_data}{_such_as(theirs)}: give "
        "data of its classes, or score its features with knn, linear or logreg."
    )


def _such_as(names: Sequence[str]) -> str:
    return f" such as {names[0]!r}" if names else ""


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo()  # reads two files


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").strip()


def _names_of(name: str) -> tuple[str, ...]:
    """What a class goes by: its name, and for WordNet's id of an ImageNet class also its words, all and each."""
    if not SYNSET.fullmatch(name):
        return (_plain(name),)
    info = _imagenet()
    words = info.label_name_to_description(name) if name in info.label_names() else ""
    return tuple(map(_plain, (name, words, *words.split(",")) if words else (name,)))


def _places(names: Sequence[str]) -> dict[str, int]:
    """The first class with each name."""
    found: dict[str, int] = {}
    for place, name in enumerate(names):
        for word in _names_of(name):
            found.setdefault(word, place)
    return found
