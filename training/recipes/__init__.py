"""What a run is: its settings, the named recipes, and both as YAML."""

from vitreg_hub.training.recipes.named import RECIPES

__all__ = ["RECIPES"]
