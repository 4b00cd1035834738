"""Small files of strangers: config.json and the metadata of cards, read with bounded work.

A file of some kB can ask for gigabytes or hours: by a number, by its nesting, or by names for parts of itself.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from vitreg_hub.errors import BundleError

LARGEST = 8 * 2**20
"""Bytes of a file: some hundred thousand names of classes."""
LARGEST_METADATA = 2**16
"""Characters of a card's metadata, which Python's YAML reads slowly."""
DEEPEST = 60
"""Lists and objects in each other: Python copies and prints them by recursion."""

MOST_BITS = 1000
"""Of a whole number; with more, not even a float could hold it."""

SIDE, WIDTH, COUNT = 10**5, 2**15, 10**4
MOST = {
    **dict.fromkeys(("img_size", "image_size", "input_size"), SIDE),
    **dict.fromkeys(("embed_dim", "hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "num_classes", "num_labels"), 10**6),
    **dict.fromkeys(("patch_size", "in_chans", "num_channels", "num_heads", "num_attention_heads"), COUNT),
    **dict.fromkeys(("reg_tokens", "num_register_tokens", "mlp_ratio"), COUNT),
    **dict.fromkeys(("depth", "depths", "num_hidden_layers", "num_layers", "layers"), 500),
}
"""The largest numbers that describe a network, under the names of timm and of transformers."""


def read_small(file: Path) -> bytes:
    """Read a file of at most `LARGEST` bytes.

    Raises:
        BundleError: It is larger, or no file.
        OSError: It cannot be read.
    """
    if not file.is_file():  # a pipe would wait for ever
        raise BundleError(f"{file} is not a file.")
    if (size := file.stat().st_size) > LARGEST:
        raise BundleError(f"{file} has {size / 2**20:,.0f} MB, more than the {LARGEST >> 20} that it may have.")
    return file.read_bytes()


def read_json(content: bytes) -> Any:
    """Read JSON that describes a network.

    Raises:
        ValueError: It is no JSON, is nested deeper than `DEEPEST`, or holds a number above `MOST`.
    """
    try:
        data = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if problem := next(excesses(data), None):
        raise ValueError(problem)
    return data


def excesses(data: Any) -> Iterator[str]:
    """Yield what in JSON is nested too deeply, or is a number that no network has."""
    left = [("", data, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > DEEPEST:
            yield f"{key or 'a list'} is nested deeper than {DEEPEST}"
        elif isinstance(value, Mapping):
            left += [(name, part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, part, depth + 1) for part in value]
        elif key in MOST and isinstance(value, int | float) and value > MOST[key]:
            yield f"{key} is {value}, but {MOST[key]:,} is the most that it may be"


class PlainLoader(yaml.SafeLoader):
    """Makes values of YAML that are as small as their text."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias of more than one value, of which a few in each other stand for millions, and deep nesting."""
        alias = self.check_event(yaml.AliasEvent)
        if self.depth > DEEPEST:
            sentence = f"lists or objects in each other without end (more than {DEEPEST})"
            raise ComposerError(None, None, sentence, self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and isinstance(node, yaml.CollectionNode):
            raise ComposerError(None, None, "an alias stands for several values: write them out", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Refuse a value that is not of the kind that it seems or claims to be, such as the date 2020-99-99."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise OverflowError
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(None, None, f"this cannot be read as {kind}", node.start_mark) from error
        return value


def read_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: It is too long, nested too deeply or no YAML, or holds a value that cannot be, such as a 40th day.
    """
    if len(text) > LARGEST_METADATA:
        raise ValueError(f"it has more than {LARGEST_METADATA:,} characters")
    loader = PlainLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    finally:
        loader.dispose()


def read_metadata(card: str) -> Any:
    """The metadata of a card; None if it has none.

    Raises:
        ValueError: As from `read_yaml`.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # takes long, and settings of a run have no card

    found = REGEX_YAML_BLOCK.search(card)
    return read_yaml(found[2]) if found else None
