"""JSON and YAML into frozen dataclasses: pydantic checks the types, strictly, and this module says what is wrong.

A dataclass that checks more than types does so in its `__post_init__`, in a sentence of its own.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vitreg_hub.errors import VitregError

T = TypeVar("T")

WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "longer",
    "too_long": "a list of {max_length}",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "literal_error": "{expected}",
    "union_tag_invalid": "of the kind {expected_tags}",
    "union_tag_not_found": "an object with the key {discriminator}",
}
"""What a value must be, by pydantic's name of what is wrong with it."""
UNKNOWN_KEY = "unexpected_keyword_argument"


def read(
    kind: type[T],
    data: Any,
    *,
    called: str = "",
    error: type[VitregError] = VitregError,
    unknown: Literal["forbid", "ignore"] = "forbid",
) -> T:
    """Read what a JSON or YAML file holds.

    Args:
        kind: A dataclass, or any other type.
        data: As `json.loads` gives it. Nothing is converted: true is no number, and "1" neither. Lists become tuples,
            whole numbers become floats where floats are wanted.
        called: The key under which the data stand; empty for all of a file.
        error: Class of what is raised.
        unknown: Whether keys that `kind` does not have are refused or passed over.

    Raises:
        error: The data are something else; the message names every key and what is wrong with it.
    """
    try:
        return _adapter(kind, unknown).validate_json(json.dumps({called: data}, default=str))[called]
    except ValidationError as found:
        raise error("; ".join(_problems(found.errors(include_url=False), {called: data}))) from found


@cache
def _adapter(kind: type[T], unknown: Literal["forbid", "ignore"]) -> TypeAdapter[dict[str, T]]:
    # inside of a dictionary, for a plain dataclass takes its settings from what holds it; JSON, for a strict reading
    # of Python's own values takes no dictionary for a dataclass
    return TypeAdapter(dict[str, kind], config=ConfigDict(strict=True, extra=unknown))


def _problems(errors: Iterable[ErrorDetails], data: Any) -> Iterator[str]:
    unknown: dict[str, list[str]] = {}
    for error in errors:
        *parents, last = _place(error, data)
        if error["type"] == UNKNOWN_KEY:
            unknown.setdefault(_key(parents), []).append(str(last))
        else:
            yield _sentence(_key([*parents, last]), error)
    for key, names in unknown.items():
        yield f"{key} holds {sorted(names)}; a newer vitreg_hub may know them"


def _sentence(key: str, error: ErrorDetails) -> str:
    told: Mapping[str, Any] = error.get("ctx", {})
    if isinstance(told.get("error"), VitregError):
        return str(told["error"])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] in WANTED:
        return f"{key} must be {WANTED[error['type']].format_map(told)}, not {error['input']!r}"
    return f"{key} cannot be read ({error['msg']})"


def _place(error: ErrorDetails, data: Any) -> list[str | int]:
    """The keys among what pydantic tells of a place, where it also names which kind of several it has tried."""
    place: list[str | int] = []
    inside = data
    for part in error["loc"]:
        if part in (inside if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()):
            place.append(part)
            inside = inside[part]
    return [*place, error["loc"][-1]] if error["type"] == "missing" else place or list(data)


def _key(location: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in location if part != "") or "the file"
