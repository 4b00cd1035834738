"""Installed as `vitreg_hub.conversion`."""

if __name__ != "vitreg_hub.conversion":
    raise ImportError("import vitreg_hub.conversion instead: under its bare name this package would be loaded twice")
