"""Installed as `vitreg_hub.model_cards`."""

if __name__ != "vitreg_hub.model_cards":
    raise ImportError("import vitreg_hub.model_cards instead: under its bare name this package would be loaded twice")
