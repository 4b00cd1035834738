"""What a conversion did, for people and for the bundle's provenance."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Conversion
from vitreg_hub.licenses import UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport(Conversion):
    """A conversion, as the terminal shows it."""

    @classmethod
    def of(cls, bundle: ModelBundle) -> Self | None:
        """The report in a bundle's provenance, None for a bundle that was not converted."""
        made = bundle.provenance.conversion
        return made and cls(**{field.name: getattr(made, field.name) for field in dataclasses.fields(cls)})

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
