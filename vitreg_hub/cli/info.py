"""`vitreg info`."""

from dataclasses import asdict
from json import dumps as to_json

from vitreg_hub.console import hide_loading


def run(model: str, *, json: bool = False) -> None:
    """Say what a model is and where it came from, without its weights.

    Args:
        model: name of `list` with or without the tag of its weights, folder, or hf-hub:org/name
        json: print the same as JSON
    """
    from vitreg_hub.bundle.info import describe

    hide_loading()
    described = describe(model)
    print(to_json(asdict(described), indent=2) if json else described)
