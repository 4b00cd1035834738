"""The bundle: an architecture, its weights, the images they expect and where they came from; one form on disk."""

from vitreg_hub.bundle.model_bundle import ModelBundle

__all__ = ["ModelBundle"]
