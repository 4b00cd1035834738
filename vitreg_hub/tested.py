"""The library versions that this package was tested with, and those that are installed.

The ranges are the extra `tested` in pyproject.toml, read from the installation's metadata: no library is imported.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

EXTRA = "tested"


@dataclass(frozen=True, kw_only=True)
class Library:
    """A library, named as pip does, with its installed version, if any, and the versions that were tested."""

    name: str
    installed: str | None
    tested: SpecifierSet

    @property
    def is_outside(self) -> bool:
        """Whether it is installed in a version that was not tested."""
        return self.installed is not None and not self.tested.contains(self.installed, prereleases=True)

    @property
    def words(self) -> tuple[str, str, str]:
        """Its name, its version, and the tested range."""
        tested = ",".join(sorted(map(str, self.tested), reverse=True))  # oldest first
        return self.name, self.installed or "not installed", f"{tested}  untested" if self.is_outside else tested


def tested_ranges() -> dict[str, SpecifierSet]:
    """The tested versions of each library."""
    wanted = map(Requirement, requires("vitreg_hub") or ())
    return {line.name: line.specifier for line in wanted if line.marker and line.marker.evaluate({"extra": EXTRA})}


def libraries(ranges: Mapping[str, SpecifierSet] | None = None) -> list[Library]:
    """Every library that this package was tested with, by default in the ranges of this installation."""
    ranges = tested_ranges() if ranges is None else ranges
    return [Library(name=name, installed=_installed(name), tested=tested) for name, tested in ranges.items()]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def version_text(verbose: bool = False, ranges: Mapping[str, SpecifierSet] | None = None) -> str:
    """The version of this package; if verbose, also of Python and of each library, with its tested `ranges`."""
    ours = f"vitreg_hub {version('vitreg_hub')}"
    if not verbose:
        return ours
    rows = [("library", "installed", "tested"), *(library.words for library in libraries(ranges))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([ours, f"python {platform.python_version()}", *lines])
