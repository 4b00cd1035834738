"""Vision Transformers with registers, for timm and transformers. Importing this registers the models, and nothing else.

It imports neither library: each gets our models at the moment when somebody imports it.
"""

from importlib import import_module
from typing import Any

from vitreg_hub.import_hook import import_after

import_after("timm.models", "vitreg_hub.timm_models")
import_after("transformers.models.auto.configuration_auto", "vitreg_hub.auto_config")


def __getattr__(name: str) -> Any:
    """What users reach as attributes of the package, made when it is asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("vitreg_hub")
    if name in ("hf_models", "timm_models"):
        return import_module(f"vitreg_hub.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
