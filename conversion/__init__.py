"""Installed as `vitreg_hub.conversion`."""

if __name__ != "vitreg_hub.conversion":
    raise ImportError("import vitreg_hub.conversion instead: under its bare name this package would be loaded twice")

from vitreg_hub.conversion.converter import convert
from vitreg_hub.conversion.exporter import export

__all__ = ["convert", "export"]
