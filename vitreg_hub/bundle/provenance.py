"""Where weights came from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from vitreg_hub import typed
from vitreg_hub.errors import BundleError

CONVERSION_KEY, ARTIFACTS_KEY, DOORS_KEY, BEST_KEY = "conversion", "artifacts", "doors", "best"
"""Keys of `Provenance.settings`: two reports, what `doors.verify` found, and by what a run's best model was chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where weights came from.

    Attributes:
        origin: One sentence.
        license: SPDX identifier, in the Hub's lower-case spelling.
        dataset: What they were trained or measured on.
        metrics: Measured figures by name, shares in [0, 1].
        settings: What a second run would need.
        versions: Versions of the libraries that were used.
        command: Command line that made them, without the machine's folders.
        commit: Commit of this package's source that did.
        created: When, in UTC (ISO 8601).
        hardware: What computed.
        seconds: Wall time that it took.
    """

    origin: str
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    created: str | None = None
    hardware: str | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def provenance_from_json(told: Any) -> Provenance:
    """Read what a config.json says under `vitreg.provenance`.

    Raises:
        BundleError: It says something else; the message names every key and what is wrong with it.
    """
    return typed.read(Provenance, told, called="vitreg.provenance", error=BundleError)


def provenance_to_json(provenance: Provenance) -> dict[str, Any]:
    """What a config.json says under `vitreg.provenance`."""
    return dataclasses.asdict(provenance)
