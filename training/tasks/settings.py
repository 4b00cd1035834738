"""What all of training asks of an objective before torch is imported: its settings' class answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from vitreg_hub.objectives import Objective

Need = Literal["labels", "texts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """Settings of an objective.

    Attributes:
        objective: What the cards of its models tell.
        task_class: ``module:class`` of the `Task` that computes it.
        needs: What every image must have.
        classifies: Whether the ViT gets a head with an output for each class of the data.
        multi_crop: Whether it compares several crops of an image.
        libraries: Distributions that it needs beside those of every run; bundles tell their versions.
    """

    objective: ClassVar[Objective]
    task_class: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()
    classifies: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    def problems(self, *, batch_size: int) -> Iterator[str]:
        """Yield what cannot be, as seen from the settings and the images of a step; nothing by default."""
        yield from ()

    def teachers(self) -> Mapping[str, str]:
        """The models that it learns from, by the setting that names each; none by default."""
        return {}
