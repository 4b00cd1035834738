"""JSON and YAML into frozen dataclasses: pydantic checks the types strictly, and this module words the mistakes.

A dataclass that checks more than types does so in its `__post_init__`, with a sentence of its own.
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
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "union_tag_invalid": "of the kind {expected_tags}",
    "union_tag_not_found": "an object with the key {discriminator}",
}
"""What a value must be, by pydantic's name of the mistake."""
UNKNOWN_KEY = "unexpected_keyword_argument"
MOST_LETTERS = 100
"""Of a value that a message quotes."""


def read(
    kind: type[T],
    data: Any,
    *,
    called: str = "",
    error: type[VitregError] = VitregError,
    unknown: Literal["forbid", "ignore"] = "forbid",
) -> T:
    """Check data from a JSON or YAML file, and read them into a type.

    Args:
        data: As `json.loads` gives it. Nothing is converted (neither true nor "1" is a number), but lists become tuples
            and whole numbers become floats where those are wanted.
        called: Key of the data in their file; empty for all of the file.
        unknown: Whether keys that `kind` does not have are refused or ignored.

    Raises:
        error: The data do not fit; the message names every wrong key and what is wrong with it.
    """
    try:
        text = json.dumps({called: data}, default=str)
        return _adapter(kind, unknown).validate_json(text)[called]
    except ValidationError as found:
        raise error("; ".join(_problems(found.errors(include_url=False), {called: data}))) from found
    except (ValueError, RecursionError) as found:  # a number of thousands of digits; lists in lists without end
        raise error(f"{_key([called])} cannot be read ({found})") from found


def parsed(text: str | bytes, *, error: type[VitregError] = VitregError) -> Any:
    """The data in the text of a JSON file.

    Raises:
        error: The text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as found:
        raise error(f"the file is not JSON ({found})") from found


def shown(value: Any) -> str:
    """A value as a message quotes it: on one line, and not endless."""
    text = repr(value)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."


@cache
def _adapter(kind: type[T], unknown: Literal["forbid", "ignore"]) -> TypeAdapter[dict[str, T]]:
    # Inside a dictionary, because a plain dataclass takes its settings from what contains it. As JSON, because strict
    # reading of Python values does not take a dictionary for a dataclass.
    return TypeAdapter(dict[str, kind], config=ConfigDict(strict=True, extra=unknown))  # pyright: ignore[reportInvalidTypeForm]  # known at run time only


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
    context: Mapping[str, Any] = error.get("ctx", {})
    if isinstance(context.get("error"), VitregError):
        return str(context["error"])
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] in WANTED:
        return f"{key} must be {wanted(error)}, not {shown(error['input'])}"
    return f"{key} cannot be read ({error['msg']})"


def wanted(error: ErrorDetails) -> str:
    """What a value must be, in words."""
    return WANTED.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))


def _place(error: ErrorDetails, data: Any) -> list[str | int]:
    """The keys of an error's location, which also names the members of unions that pydantic has tried."""
    place: list[str | int] = []
    inside = data
    for part in error["loc"]:
        try:
            inside = inside[part]
        except (KeyError, IndexError, TypeError):
            continue
        place.append(part)
    if error["type"] == "missing":
        return [*place, error["loc"][-1]]
    return place or list(data)


def _key(location: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in location if part != "") or "the file"
