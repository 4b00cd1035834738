"""Artifact reports as JSON and back."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.errors import DataError
from vitreg_hub.typed import read

FORM = 1
"""Version of the form; a reader refuses others."""


def to_json(reports: Sequence[ArtifactReport]) -> str:
    """Text of a report.json: all that was measured, without pictures."""
    content = {"form": FORM, "reports": [to_dict(report) for report in reports]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def to_dict(report: ArtifactReport) -> dict[str, Any]:
    """A report as plain values, as they are in its JSON."""
    return dataclasses.asdict(dataclasses.replace(report, examples=())) | {
        "outlier_fraction": report.outlier_fraction,
        "first_outlier_block": report.first_outlier_block,
    }


def load_reports(file: str | Path) -> tuple[ArtifactReport, ...]:
    """Read a report.json.

    Raises:
        DataError: It is not one, or has another version.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        form, reports = content["form"], content["reports"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a report of `vitreg analyze` ({error}): give its report.json.") from error
    if form != FORM:
        raise DataError(f"{file} has form {form!r}, this reads form {FORM}: analyze the models again.")
    return read(tuple[ArtifactReport, ...], reports, called=f"{file}: reports", error=DataError, unknown="ignore")
