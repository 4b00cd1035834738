"""Arguments of commands, written once: names, types and defaults in a signature, texts in its docstring."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from inspect import BoundArguments, Parameter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from vitreg_hub.console import console

N = Annotated[int, "N"]
OptionalN = Annotated[int | None, "N"]
ImageSize = Annotated[str | None, "N or H,W"]
NumberType = Literal["float32", "bfloat16", "float16"]


def call(command: Callable[..., None], args: Sequence[str], *, called: str) -> None:
    """Run a function with the arguments of a command line; its keyword parameters are options."""
    parser = ArgumentParser(prog=called, description=summary(command))
    for names, settings in arguments(command):
        parser.add_argument(*names, **settings)
    given = parser.parse_args(args).as_dict()
    with console():
        bound = BoundArguments(inspect.signature(command), given)
        command(*bound.args, **bound.kwargs)


def arguments(command: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield what argparse's `add_argument` takes, for each parameter of a function, or each field of a dataclass.

    ``Annotated[int, "N"]`` names the value in the help.
    """
    hints, meanings = get_type_hints(command, include_extras=True), texts(command)
    for name, parameter in inspect.signature(command).parameters.items():
        hint, *shown = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        settings: dict[str, Any] = {"help": meanings[name], **_kind(hint)}
        if shown:
            settings["metavar"] = shown[0]
        required, option = parameter.default is Parameter.empty, parameter.kind is Parameter.KEYWORD_ONLY
        if not required and hint is not bool:
            settings["default"] = parameter.default
        if parameter.kind is Parameter.VAR_POSITIONAL:
            settings["nargs"] = "+"
        elif option and required:
            settings["required"] = True
        elif not option and not required:
            settings["nargs"] = "?"
        yield (f"--{name.replace('_', '-')}" if option else name,), settings


def _kind(hint: Any) -> dict[str, Any]:
    """The settings of argparse for a type; text needs none."""
    if get_origin(hint) is UnionType:
        return _kind(next(member for member in get_args(hint) if member is not NoneType))
    if get_origin(hint) is Literal:
        return {"choices": list(get_args(hint))}
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is list:
        return {"action": "append"}
    return {} if hint is str else {"type": hint}


def summary(documented: object) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def texts(documented: object) -> dict[str, str]:
    """The text of each argument of a function, or of each attribute of a class, in a Google-style docstring."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?)+)", inspect.getdoc(documented) or "", re.MULTILINE)
    entries = re.findall(r"^    \*{0,2}(\w+): (.*(?:\n        .*)*)", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
