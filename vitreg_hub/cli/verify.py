"""`vitreg verify`."""

from vitreg_hub.cli.values import print_doors
from vitreg_hub.console import hide_loading


def run(folder: str) -> None:
    """Open a bundle in timm and in transformers, with and without vitreg_hub, and compare all outputs.

    Args:
        folder: folder of a bundle, hf-hub:org/name, or the name of weights in this package
    """
    from vitreg_hub.bundle.doors import verify

    hide_loading()
    print_doors(verify(folder))
