"""JSON into dataclasses: what is taken, and the sentence that says why something is not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from vitreg_hub import typed
from vitreg_hub.errors import BundleError, VitregError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise VitregError(f"share must be a number from 0 to 1, not {self.share!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    sides: tuple[int, int] = (1, 1)
    figures: Mapping[str, float] | None = None
    exact: bool = True
    kind: Literal["one", "two"] = "one"
    inner: Inner = Inner()
    rest: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    kind: Literal["box"] = "box"
    width: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ball:
    kind: Literal["ball"] = "ball"
    radius: float


Thing = Annotated[Box | Ball, Field(discriminator="kind")]
"""One of several kinds, which tells its own."""


def test_json_becomes_the_dataclass():
    data = {"name": "a", "sides": [2, 3], "figures": {"x": 1}, "exact": False, "inner": {"share": 1}, "rest": [{}]}
    read = typed.read(Outer, data)
    assert read == Outer(name="a", sides=(2, 3), figures={"x": 1.0}, exact=False, inner=Inner(share=1.0), rest=[{}])
    assert isinstance(read.figures["x"], float)
    assert typed.read(tuple[int, ...], [1, 2]) == (1, 2)


WRONG = [
    ({"name": 3}, "a.name must be text, not 3"),
    ({}, "a.name is missing"),
    ([], "a must be an object, not []"),
    ({"name": "x", "sides": [1, 2.5]}, "a.sides.1 must be a whole number, not 2.5"),
    ({"name": "x", "sides": [True, 1]}, "a.sides.0 must be a whole number, not True"),
    ({"name": "x", "sides": [1, 2, 3]}, "a.sides must be a list of 2, not [1, 2, 3]"),
    ({"name": "x", "sides": "12"}, "a.sides must be a list, not '12'"),
    ({"name": "x", "figures": {"y": "1"}}, "a.figures.y must be a number, not '1'"),
    ({"name": "x", "figures": [1]}, "a.figures must be an object, not [1]"),
    ({"name": "x", "exact": 0}, "a.exact must be true or false, not 0"),
    ({"name": "x", "kind": "three"}, "a.kind must be 'one' or 'two', not 'three'"),
    ({"name": "x", "inner": {"share": 2}}, "share must be a number from 0 to 1, not 2.0"),
    ({"name": "x", "inner": {"share": math.nan}}, "share must be a number from 0 to 1, not nan"),
    (
        {"name": "x", "inner": {"more": 1, "also": 2}},
        "a.inner holds ['also', 'more']; a newer vitreg_hub may know them",
    ),
    (
        {"name": 1, "exact": None, "more": 1},
        "a.name must be text, not 1; a.exact must be true or false, not None; a holds",
    ),
]


@pytest.mark.parametrize(("data", "says"), WRONG, ids=str)
def test_anything_else_is_named_with_its_key(data, says):
    with pytest.raises(BundleError) as caught:
        typed.read(Outer, data, called="a", error=BundleError)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_one_of_several_kinds():
    assert typed.read(dict[str, Thing], {"x": {"kind": "ball", "radius": 1}}) == {"x": Ball(radius=1.0)}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"kind": "ball", "radius": "1"}, "a.x.radius must be a number, not '1'"),
        ({"kind": "ball"}, "a.x.radius is missing"),
        ({"kind": "ball", "radius": 1, "ball": 1}, "a.x holds ['ball']; a newer"),
        ({"kind": "cone"}, "a.x must be of the kind 'box', 'ball', not {'kind': 'cone'}"),
        ({"radius": 1}, "a.x must be an object with the key 'kind', not {'radius': 1}"),
    ],
    ids=str,
)
def test_the_kind_that_was_tried_is_no_key(data, says):
    with pytest.raises(VitregError) as caught:
        typed.read(dict[str, Thing], {"x": data}, called="a")
    assert str(caught.value).startswith(says)


def test_unknown_keys_can_be_passed_over():
    assert typed.read(Box, {"width": 2, "height": 3}, unknown="ignore") == Box(width=2.0)
    with pytest.raises(VitregError, match="height"):
        typed.read(Box, {"width": 2, "height": 3})


def test_text_that_is_no_unicode_is_refused():
    with pytest.raises(VitregError, match=r"^a cannot be read"):
        typed.read(str, "\ud800", called="a")


def test_a_whole_file_has_no_key():
    with pytest.raises(VitregError, match=r"^exact must be .*; the file holds \['more'\]"):
        typed.read(Outer, {"name": "x", "exact": 3, "more": 1})
    with pytest.raises(VitregError, match=r"^the file must be an object, not 3$"):
        typed.read(Outer, 3)


def test_nesting_without_end_is_refused():
    deep: list = []
    for _ in range(500):
        deep = [deep]
    with pytest.raises(VitregError, match="cannot be read"):
        typed.read(Outer, {"name": "x", "rest": deep}, called="a")
