"""Vision Transformers with registers, for timm and transformers. Importing registers the models, and nothing else."""

from importlib.metadata import version

from vitreg_hub import hf_models, timm_models

__version__ = version("vitreg_hub")

timm_models.register()
hf_models.register()
