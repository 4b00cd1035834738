"""What a conversion did, as the provenance of its bundle tells it."""

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Conversion


class ConversionReport(Conversion):
    """A conversion; its text is the table that the terminal shows."""

    @staticmethod
    def of(bundle: ModelBundle) -> Conversion | None:
        """The report in a bundle's provenance, None for a bundle that was not converted."""
        return bundle.provenance.conversion
