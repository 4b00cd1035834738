"""Brings a card's metadata up to date and keeps what its author has changed.

A merge has three sides: what we wrote last (`record`), what stands there now, and what we would write today. A value
that is still ours is renewed; what the author changed, added or removed stays. In lists this holds for each member, in
a model-index for each result. A renewed value loses its comments; all other text keeps every character.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from vitreg_hub.model_cards.metadata import SOURCE

LICENSE, LICENSE_NAME, LICENSE_LINK, MODEL_INDEX = "license", "license_name", "license_link", "model-index"
OF_LICENSE = (LICENSE, LICENSE_NAME, LICENSE_LINK)
ORDER = ("base_model", "datasets", "library_name", *OF_LICENSE, "pipeline_tag", "tags", MODEL_INDEX)
"""Our keys, in the order in which `ModelCardData` writes them; a link to a license is always the author's."""

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
        tree, theirs = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        theirs = {} if tree is None else theirs
        if not isinstance(theirs, dict):
            return None
        wanted = _merged(theirs, old, new, settled_license)
        if wanted == theirs:
            return card
        merged = _spliced(text, _places(text, tree), theirs, wanted)
        if yaml.safe_load(merged) != wanted:  # all on one line, or with anchors
            return None
    except (yaml.YAMLError, ValueError):  # ValueError: an impossible date
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


def _spliced(
    text: str, places: Mapping[str, tuple[int, int]], theirs: Mapping[str, Any], wanted: Mapping[str, Any]
) -> str:
    """The YAML text with the wanted values of our keys; new keys stand before our next one, or at the end."""

    def changes() -> Iterator[tuple[int, int, str]]:
        for index, key in enumerate(ORDER):
            if theirs.get(key) == wanted.get(key):
                continue
            if key not in places:
                place = min((places[later][0] for later in ORDER[index:] if later in places), default=len(text))
                yield place, place, f"{_yaml({key: wanted[key]})}\n"
            elif key in wanted:
                yield *places[key], _yaml({key: wanted[key]})
            else:
                start, end = places[key]
                yield start, text.index("\n", end) + 1, ""

    parts, done = [], 0
    for start, end, lines in sorted(changes(), key=lambda change: change[:2]):
        parts += [text[done:start], lines]
        done = end
    return "".join([*parts, text[done:]])


def _places(text: str, tree: yaml.MappingNode | None) -> dict[str, tuple[int, int]]:
    """Where each key begins and its value ends."""
    return {key.value: (key.start_mark.index, _end(text, value)) for key, value in (tree.value if tree else ())}


def _end(text: str, node: yaml.Node) -> int:
    """Where a value ends, without the comments and empty lines that follow."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    return len(text[: node.end_mark.index].rstrip())


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml_dump(data, sort_keys=False).strip()
