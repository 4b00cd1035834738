"""What a conversion did, for people and for the bundle's provenance."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import CONVERSION_KEY
from vitreg_hub.licenses import UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """One conversion.

    Attributes:
        source: File or folder, without the path to it, or repository with its commit.
        sha256: Checksum of every weights file.
        format: Name of the format.
        arch: Name of the row of the table.
        license: Under which the weights went on; None if nobody knows.
        num_mapped: Tensors of the source that the bundle holds.
        dropped: Tensors that it does not, by reason.
        network: What no tensor tells, as the bundle has it now.
        notes: What a user should know.
        untrained_registers: Registers that were drawn at random.
        measured: Largest absolute difference to a reference implementation by output, with its name under "reference";
            empty where it was not measured.
    """

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
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, bundle: ModelBundle) -> Self | None:
        """The report in a bundle's provenance, None for a bundle that was not converted."""
        settings = bundle.provenance.settings.get(CONVERSION_KEY)
        return cls(**settings) if settings else None

    def as_settings(self) -> dict[str, Any]:
        """The report as a part of `Provenance.settings`: JSON-safe, and in the order in which a config.json has it."""
        return {CONVERSION_KEY: json.loads(json.dumps(dataclasses.asdict(self), sort_keys=True))}

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
        differences = {name: value for name, value in self.measured.items() if name != "reference"}
        rows += [
            ("difference", f"{value:.2g} in {name}, to {self.measured['reference']}")
            for name, value in differences.items()
        ]
        if not differences:
            why = self.measured.get("reference", "--verify compares with a reference implementation")
            rows.append(("difference", f"not measured ({why})"))
        return "\n".join(f"{key.ljust(13)}{value}" for key, value in rows)
