"""Brings a card's metadata up to date and keeps what its author has changed.

A merge has three sides: what we wrote last (`record`), what stands there now, and what we would write today. A value
that is still ours is renewed; what the author changed, added or removed stays. In lists this holds for each member, in
a model-index for each result. A renewed list loses the comments inside it; all other text keeps every character.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from vitreg_hub.bounded import read_yaml
from vitreg_hub.model_cards.metadata import SOURCE

LICENSE, LICENSE_NAME, LICENSE_LINK, MODEL_INDEX = "license", "license_name", "license_link", "model-index"
OF_LICENSE = (LICENSE, LICENSE_NAME, LICENSE_LINK)
ORDER = ("base_model", "datasets", "library_name", *OF_LICENSE, "pipeline_tag", "tags", MODEL_INDEX)
"""Our keys, in the order in which `ModelCardData` writes them; a link to a license is always the author's."""

ENTRY = r"^[\"']?(?:{})[\"']? *:.*?((?<=\S)[ \t]+#.*)?\n(?:(?:[ \t]*(?:#.*)?\n)*(?:[ \t]+[^\s#]|[\]}}-]).*\n)*"
"""The lines of a key and its value in YAML, without comments and empty lines that follow; the comment of the first."""
RECORD = re.compile(r"<!-- (\{.*\}) -->")


def front_matter(data: Mapping[str, Any]) -> str:
    """Metadata as the beginning of a card."""
    return f"---\n{_yaml(data)}\n---\n"


def record(data: Mapping[str, Any]) -> str:
    """A comment for `recorded`: our metadata, but a model-index without its content."""
    plain = json.dumps({**data, MODEL_INDEX: []} if MODEL_INDEX in data else data)
    plain = plain.replace("--", r"-\u002d")  # two hyphens could end the comment
    return f"<!-- {plain} -->"


def recorded(text: str) -> dict[str, Any]:
    """The metadata in a comment of `record`; empty if there is no such comment."""
    found = RECORD.search(text)
    try:
        return json.loads(found[1]) if found else {}
    except ValueError:  # someone has edited it
        return {}


def merge(card: str, *, old: Mapping[str, Any], new: Mapping[str, Any], settled_license: bool = False) -> str | None:
    """Bring a card's metadata from what we wrote last, if known, to what we would write today.

    A settled license holds even if the author has changed the card's.

    Returns:
        The card; None if its metadata cannot be read or merged.
    """
    line_end = "\r\n" if "\r\n" in card else "\n"
    found = REGEX_YAML_BLOCK.search(card)
    if found is None:
        return (front_matter(new) + "\n").replace("\n", line_end) + card
    text = found[2].replace("\r\n", "\n") + "\n" if found[2].strip() else ""
    try:
        theirs = read_yaml(text)
        theirs = {} if theirs is None else theirs
        if not isinstance(theirs, dict):
            return None
        wanted = _merged(theirs, old, new, settled_license)
        if wanted == theirs:
            return card
        merged = _spliced(text, theirs, wanted)
        if read_yaml(merged) != wanted:  # all on one line, or with anchors
            return None
    except ValueError:
        return None
    return card[: found.start(2)] + merged.rstrip("\n").replace("\n", line_end) + card[found.end(2) :]


def _merged(
    theirs: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any], settled_license: bool
) -> dict[str, Any]:
    """An author's values merged with ours."""
    stated = {key: theirs[key] for key in (LICENSE, LICENSE_NAME) if theirs.get(key) is not None}
    others, ours = ({key: x for key, x in side.items() if key not in (LICENSE, LICENSE_NAME)} for side in (old, new))
    if settled_license:  # as if we had written what stands there
        old = others | stated
    elif theirs.get(LICENSE) != old.get(LICENSE):  # the author's, and then so is its name
        old, new = others, ours
    merged = dict(theirs)
    for key in ORDER:
        if theirs.get(key) is None:
            value = None if key in old else new.get(key)
        elif key == MODEL_INDEX:
            value = _merged_index(theirs[key], new.get(key, []))
        elif theirs[key] == old.get(key):
            value = new.get(key)
        elif isinstance(new.get(key), list):
            value = _merged_list(theirs[key], old.get(key), new[key])
        else:
            value = theirs[key]
        if value:
            merged[key] = value
        elif theirs.get(key):
            del merged[key]
    if str(merged.get(LICENSE)).lower() != str(theirs.get(LICENSE)).lower():  # name and link of the old one go
        merged = {key: value for key, value in merged.items() if key not in (LICENSE_NAME, LICENSE_LINK)}
        merged |= {key: value for key, value in new.items() if key == LICENSE_NAME}
    elif merged.get(LICENSE_NAME) != theirs.get(LICENSE_NAME):
        merged.pop(LICENSE_LINK, None)
    return merged


def _merged_list(theirs: Any, old: Any, new: Sequence[Any]) -> list[Any]:
    """Their list, without our members that are gone and with our new ones."""
    theirs, old = (value if isinstance(value, list) else [value] if value else [] for value in (theirs, old))
    kept = [value for value in theirs if value in new or value not in old]
    return kept + [value for value in new if value not in theirs and value not in old]


def _merged_index(theirs: Any, new: Sequence[Mapping[str, Any]]) -> Any:
    """The results of others, with today's of ours in place of the old ones or at the end."""
    if not isinstance(theirs, list) or not all(isinstance(model, dict) for model in theirs):
        return theirs
    index, left = [], list(new)
    for model in theirs:
        results = model.get("results")
        results = results if isinstance(results, list) else []
        others = [result for result in results if not _is_ours(result)]
        if left and (len(others) < len(results) or model.get("name") == left[0]["name"]):
            ours = left.pop()
            index.append({**model, "name": ours["name"], "results": [*ours["results"], *others]})
        elif others or not results:
            index.append({**model, "results": others} if results else model)
    return index + left


def _is_ours(result: Any) -> bool:
    source = result.get("source") if isinstance(result, dict) else None
    return isinstance(source, dict) and source.get("name") == SOURCE


def _spliced(text: str, theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The YAML text with the wanted values of our keys; new keys stand before our next one, or at the end."""
    for index, key in enumerate(ORDER):
        if theirs.get(key) == wanted.get(key):
            continue
        lines = f"{_yaml({key: wanted[key]})}\n" if key in wanted else ""
        if place := re.search(ENTRY.format(key), text, re.MULTILINE):
            lines = lines.replace("\n", f"{place[1] or ''}\n", 1)
        else:
            place = re.search(ENTRY.format("|".join(ORDER[index:])), text, re.MULTILINE)
            lines += place[0] if place else ""
        start, end = place.span() if place else (len(text), len(text))
        text = text[:start] + lines + text[end:]
    return text


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml_dump(data, sort_keys=False).strip()
