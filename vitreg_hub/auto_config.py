"""What AutoConfig holds for timm's models until it reads or makes the first configuration of one.

Only then are our classes and timm imported. Before that they cannot be: transformers imports its auto classes in the
middle of modules that our classes need.
"""

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class LazyVitRegConfig(PreTrainedConfig):
    """Stands in for `VitRegConfig` and is never instantiated; importing `hf_models` replaces it by the real class."""

    model_type = "timm_wrapper"

    def __new__(cls, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        from vitreg_hub.hf_models import VitRegConfig

        return VitRegConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Read a config.json, as `VitRegConfig.from_dict` does."""
        from vitreg_hub.hf_models import VitRegConfig

        return VitRegConfig.from_dict(config_dict, **kwargs)


AutoConfig.register(LazyVitRegConfig.model_type, LazyVitRegConfig, exist_ok=True)
