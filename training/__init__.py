"""Installed as `vitreg_hub.training`."""

if __name__ != "vitreg_hub.training":
    raise ImportError("import vitreg_hub.training instead: under its bare name this package would be loaded twice")
