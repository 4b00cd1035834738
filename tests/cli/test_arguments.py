"""A function's signature and docstring as the arguments of a command."""

from typing import Annotated, Literal

import pytest

from vitreg_hub.cli.arguments import call


def command(
    model: str,
    *images: Annotated[str, "IMAGE"],
    max_images: Annotated[int | None, "N"] = None,
    kind: Literal["a", "b"] = "a",
    create_pr: bool = False,
    config: Annotated[list[str] | None, "FILE"] = None,
) -> None:
    """Look at images.

    Args:
        model: one to look with,
            which is 100 % known
        *images: what to look at
        max_images: no more
        kind: of the look
        create_pr: ask for it
        config: read it
    """
    print(model, images, max_images, kind, create_pr, config)


def optional(pattern: str = "*", *, format: float) -> None:
    """List.

    Args:
        pattern: of names
        format: must be given
    """
    print(pattern, format)


@pytest.mark.parametrize(
    ("function", "line", "printed"),
    [
        (command, "m x y", "m ('x', 'y') None a False None"),
        (command, "--max-images 3 m x --kind=b --create-pr --config c --config d", "m ('x',) 3 b True ['c', 'd']"),
        (optional, "--format 3", "* 3.0"),
        (optional, "vit_* --format 3", "vit_* 3.0"),
    ],
)
def test_values(function, line, printed, capsys):
    call(function, line.split(), called="vitreg look")
    assert capsys.readouterr().out == f"{printed}\n"


@pytest.mark.parametrize(
    ("function", "line", "says"),
    [
        (command, "m", "the following arguments are required: images"),
        (command, "m x --max-images y", "max_images"),
        (command, "m x --kind c", "invalid choice: 'c'"),
        (optional, "", "the following arguments are required: format"),
    ],
)
def test_mistakes(function, line, says, capsys):
    with pytest.raises(SystemExit) as done:
        call(function, line.split(), called="vitreg look")
    assert done.value.code == 2
    assert says in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        call(command, ["--help"], called="vitreg look")
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("usage: vitreg look ")
    assert "Look at images." in shown
    assert "model one to look with, which is 100 % known (required)" in shown
    assert "IMAGE what to look at (required)" in shown
    assert "--max-images N no more (type: int, default: null)" in shown
    assert "--kind {a,b} of the look (default: a)" in shown
