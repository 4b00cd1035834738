"""JSON of others read into this package's dataclasses; what does not fit is told in one sentence."""

import json
import reprlib
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from vitreg_hub.errors import BundleError, VitregError

T = TypeVar("T")

WORDS = {
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid array": "a list",
    "a valid boolean": "true or false",
    "a valid tuple": "a list",
}
"""What pydantic calls a kind of value, and what we call it."""


def read(
    kind: type[T],
    data: Any,
    *,
    called: str,
    error: type[VitregError] = BundleError,
    unknown: Literal["forbid", "ignore"] = "forbid",
) -> T:
    """Read JSON-safe data into a dataclass. Nothing is converted: the text "1" is no number.

    Args:
        kind: The dataclass, or any type that pydantic knows.
        data: As json or yaml gave it.
        called: Its name, with which every complaint begins.
        error: What to raise.
        unknown: What to do about keys that the dataclass does not have.

    Raises:
        VitregError: Of the kind `error`; one line that names all that does not fit.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(data), strict=True, extra=unknown)
    except ValidationError as found:
        raise error("; ".join(_sentence(problem, data, called) for problem in found.errors())) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(problem: ErrorDetails, data: Any, called: str) -> str:
    """What is wrong with one value, by its place in the data."""
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, VitregError):  # raised by one of our own dataclasses
        return str(reason)
    if problem["type"] == "json_invalid":  # half of a surrogate pair, which Python's json lets pass
        return f"{called} holds text that is no Unicode"
    *parents, key = problem["loc"] or ("",)
    place = called
    for part in parents:
        place, data = _inside(place, data, part)
    if problem["type"] == "unexpected_keyword_argument":
        return f"{place} holds {[key]}; a newer vitreg_hub may know them"
    if problem["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{place} lacks {key}"
    place, data = _inside(place, data, key)
    if problem["type"] == "union_tag_not_found":
        return f"{place} lacks {problem['ctx']['discriminator']}"
    wanted = problem["msg"].removeprefix("Input should be ")
    if problem["type"] == "union_tag_invalid":
        wanted = f"of the kind {problem['ctx']['expected_tags'].replace(',', ' or')}"
    return f"{place} must be {WORDS.get(wanted, wanted)}, not {reprlib.repr(data)}"


def _inside(place: str, data: Any, part: str | int) -> tuple[str, Any]:
    """The name and the value of a part, or the same again where pydantic names one kind of several."""
    if isinstance(part, int) and isinstance(data, list | tuple) and part < len(data):
        return f"{place}[{part}]", data[part]
    if isinstance(data, dict) and part in data:
        return f"{place}.{part}" if str(part).isidentifier() else f"{place}[{part!r}]", data[part]
    return place, data
