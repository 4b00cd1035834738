"""Base class of the objectives' settings: what is known about an objective before torch is imported."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from vitreg_hub.objectives import Objective

Need = Literal["labels", "texts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings:
    """Settings of an objective.

    Attributes:
        objective: Description of the objective for model cards.
        task_class: ``module:class`` of the `Task` that computes it.
        needs: What every image must have.
        classifies: Whether the ViT gets a head with an output for each class of the data.
        multi_crop: Whether it compares several crops of an image.
        libraries: Additional distributions that it needs; bundles record their versions.
    """

    objective: ClassVar[Objective]
    task_class: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]] = ()
    classifies: ClassVar[bool] = False
    multi_crop: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ()

    def problems(self, *, batch_size: int) -> Iterator[str]:
        """Yield contradictions in the settings or with the batch size; none by default."""
        yield from ()

    def teachers(self) -> Mapping[str, str]:
        """Names of the models that it learns from, by setting; none by default."""
        return {}
