"""A command's arguments, written once: names, types and defaults in a signature, their texts in its docstring."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from inspect import BoundArguments, Parameter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from vitreg_hub.console import console
from vitreg_hub.docstrings import summary, texts

N = Annotated[int, "N"]
OptionalN = Annotated[int | None, "N"]
ImageSize = Annotated[str | None, "N or H,W"]
NumberType = Literal["float32", "bfloat16", "float16"]


def call(command: Callable[..., None], args: Sequence[str], *, called: str) -> None:
    """Run a command with the arguments of a command line.

    Args:
        command: Positional arguments are its positional parameters, options those that are given by name.
        args: The arguments.
        called: What the command is called in its help.
    """
    parser = ArgumentParser(prog=called, description=summary(command))
    for names, settings in arguments(command):
        parser.add_argument(*names, **settings)
    given = parser.parse_args(args).as_dict()
    with console():
        bound = BoundArguments(inspect.signature(command), given)
        command(*bound.args, **bound.kwargs)


def arguments(command: Callable[..., Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield what argparse's `add_argument` takes, for each parameter of a function, or each field of a dataclass.

    ``Annotated[int, "N"]`` tells how a value is called in the help.
    """
    hints, meanings = get_type_hints(command, include_extras=True), texts(command)
    for name, parameter in inspect.signature(command).parameters.items():
        hint, *shown = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        settings: dict[str, Any] = {"help": meanings[name], **_kind(hint)}
        if shown:
            settings["metavar"] = shown[0]
        required = parameter.default is Parameter.empty
        if not required and hint is not bool:
            settings["default"] = parameter.default
        if parameter.kind is Parameter.VAR_POSITIONAL:
            yield (name,), {**settings, "nargs": "+"}
        elif parameter.kind is Parameter.KEYWORD_ONLY:
            yield (f"--{name.replace('_', '-')}",), settings | ({"required": True} if required else {})
        else:
            yield (name,), settings | ({} if required else {"nargs": "?"})


def _kind(hint: Any) -> dict[str, Any]:
    """What argparse wants to know of a type; texts are taken as they are."""
    if get_origin(hint) is UnionType:
        return _kind(next(member for member in get_args(hint) if member is not NoneType))
    if get_origin(hint) is Literal:
        return {"choices": list(get_args(hint))}
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is list:
        return {"action": "append"}
    return {} if hint is str else {"type": hint}
