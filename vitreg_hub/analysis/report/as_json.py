"""Artifact reports as JSON and back."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.errors import DataError

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
        DataError: It is not one, or of another version.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if content["form"] != FORM:
            raise DataError(f"{file} has form {content['form']!r}, this reads form {FORM}: analyze the models again.")
        return tuple(_built(ArtifactReport, report) for report in content["reports"])
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no report of `vitreg analyze` ({error}): give its report.json.") from error


def _built(kind: Any, value: Any) -> Any:
    """Make what a type annotation says of what JSON gave."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        fields = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return kind(**{name: _built(hints[name], value[name]) for name in fields})
    if isinstance(kind, types.UnionType):
        return None if value is None else _built(next(k for k in typing.get_args(kind) if k is not type(None)), value)
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        inner = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(_built(k, v) for k, v in zip(inner, value, strict=True))
    return dict(value) if isinstance(value, Mapping) else value
