"""Which of several sets of weights: those in a file's dictionaries, and those under prefixes of names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitreg_hub.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor

EMA, RAW = "ema", "raw"
"""What a user may ask for beside a key."""

MAX_NESTING = 8
"""Dictionaries within dictionaries."""
MAX_KEY = 200
"""Characters of a key; no program has longer ones."""

FIRST = ("state_dict_ema", "model_ema")
"""The averaged sets that timm takes (timm/models/_helpers.py, `load_state_dict`), best first."""
USUAL = ("state_dict", "model", "module")
"""The usual keys of the others, best first."""
AVERAGED = re.compile(
    r"(?<![a-z])(?i:ema|averaged?|avg|swa|teacher|momentum|target|polyak|shadow)(?![a-z])|E(MA|ma)(?![a-z])"
)
"""Keys of weights that were averaged over the steps of a training run."""
NO_WEIGHTS = re.compile("optim|sched|scaler|exp_avg|grad", re.IGNORECASE)
"""Keys of what a training run saves beside weights and what looks like them."""

ANCHORS = ("embeddings.cls_token", "embeddings.class_embedding", "cls_token", "class_embedding")
"""Names that every ViT has one of."""

WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names."""
WRAPPER, COUNTER = "module", "n_averaged"
"""What DDP and averaged models put into names, and the number that torch's AveragedModel has beside it."""


def sets_in(content: Any) -> dict[str, dict[str, Tensor]]:
    """The dictionaries of tensors in a file's content, by their keys joined by dots; the file itself is ""."""
    from torch import Tensor  # formats, which are listed without torch, also use this module

    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()

    def look(inside: Any, path: tuple[str, ...]) -> None:
        if not isinstance(inside, Mapping) or id(inside) in seen or len(path) > MAX_NESTING:
            return
        seen.add(id(inside))
        before = len(found)
        for key, value in inside.items():
            if isinstance(key, str) and len(key) <= MAX_KEY and key.isprintable() and not NO_WEIGHTS.search(key):
                look(value, (*path, key))
        tensors = {key: value for key, value in inside.items() if isinstance(key, str) and isinstance(value, Tensor)}
        is_most = len(tensors) > len(inside) / 2
        if (is_most or len(found) == before) and any(
            tensor.ndim and tensor.is_floating_point() for tensor in tensors.values()
        ):
            found[".".join(path)] = tensors

    look(content, ())
    return found


def is_averaged(key: str) -> bool:
    """Whether a key or prefix is that of averaged weights."""
    return AVERAGED.search(key) is not None


def fitting(keys: Iterable[str], wanted: str) -> list[str]:
    """The keys that are meant by `wanted`, only the best of them where some are better known than others.

    Args:
        wanted: "" for the averaged ones if there are any, "ema", "raw", or a key or a part of one.
    """
    keys = list(keys)
    averaged = [key for key in keys if is_averaged(key)]
    raw = [key for key in keys if key not in averaged]
    if wanted not in ("", EMA, RAW):
        return [key for key in keys if key == wanted] or [key for key in keys if f".{wanted}." in f".{key}."]
    meant = {"": averaged or raw, EMA: averaged, RAW: raw}[wanted]
    best = min(map(_rank, meant), default=0)
    return [key for key in meant if _rank(key) == best]


def _rank(key: str) -> int:
    parts = key.split(".")
    if key in FIRST:
        return FIRST.index(key)
    if is_averaged(key):
        return len(FIRST)
    if all(part in USUAL for part in parts):
        return USUAL.index(parts[0])
    return len(USUAL) + bool(key)


def require_one(found: Sequence[str], keys: Collection[str], wanted: str, *, called: str) -> str:
    """The only one of the keys that are meant.

    Raises:
        ConversionError: There are none or several.
    """
    if len(found) == 1:
        return found[0]
    there = ", ".join(repr(key) for key in sorted(keys, key=lambda key: (not is_averaged(key), key)) if key) or "one"
    kind = {"": "", EMA: "averaged ", RAW: "raw "}.get(wanted)
    if not found:
        what = f"no weights under {wanted!r}" if kind is None else f"no {kind}weights"
        raise ConversionError(f"{called} holds {what}; the sets in it: {there}.")
    raise ConversionError(
        f"{called} holds {len(found)} sets of {kind or ''}weights ({', '.join(map(repr, found))}): "
        f"choose with --weights {next(filter(None, found))}."
    )


def choice_note(chosen: str, keys: Collection[str], wanted: str) -> Iterator[str]:
    """Which of several sets was chosen, in a sentence."""
    others = [key for key in keys if key != chosen]
    if not others:
        return
    names = ", ".join(repr(key) if key else "those outside of any dictionary" for key in others)
    kind = ", the averaged ones" if is_averaged(chosen) else ""
    why = "as asked for" if wanted else "as timm chooses" if chosen in FIRST else "by the rule that averaged come first"
    if not (wanted or is_averaged(chosen)):
        why = "the usual key"
    yield f"the weights are those under {chosen!r}{kind} ({why}), not {names}: --weights KEY takes others"


def vit_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes, without their last dots, under which a ViT lies; averaged ones first."""
    found: dict[str, None] = {}
    for name in names:
        if anchor := next((a for a in ANCHORS if name == a or name.endswith(f".{a}")), ""):
            found[name.removesuffix(anchor).rstrip(".")] = None
    return sorted(found, key=lambda prefix: (not is_averaged(prefix), prefix))


def prefix_of(names: Collection[str], wanted: str, *, averaged: bool, keys: Collection[str], called: str) -> str:
    """The prefix that is meant where no dictionary of the file was; "" for all names.

    Args:
        wanted: As for `fitting`, never "".
        averaged: Whether all of them are.

    Raises:
        ConversionError: There are no such weights, or several.
    """
    prefixes = vit_prefixes(names)
    if wanted in (EMA, RAW) and averaged:
        return require_one([""] if wanted == EMA else [], keys, wanted, called=called)
    if wanted not in (EMA, RAW) and any(name.startswith(f"{wanted}.") for name in names):
        return wanted
    if wanted == RAW and not any(map(is_averaged, prefixes)):
        return ""
    return require_one(fitting(prefixes, wanted), {*keys, *prefixes}, wanted, called=called)


def unwrapped(stored: Collection[str], *, called: str) -> dict[str, str]:
    """The stored names, by these names without what wrappers put before or into them.

    A module called "module" is a wrapper where nothing stands beside it but the counter of an averaged model, which is
    left out.

    Raises:
        ConversionError: Two tensors then have the same name.
    """
    names = {WRAPPERS.sub("", name): name for name in stored}
    num_left_out = 0
    for _ in range(MAX_NESTING):
        beside: dict[str, set[str]] = {}
        for name in names:
            parts = name.split(".")
            for depth, part in enumerate(parts):
                beside.setdefault(".".join(parts[:depth]), set()).add(part)
        wrapping = [parent for parent, parts in beside.items() if {WRAPPER} == parts - {COUNTER}]
        inside = {f"{parent}.{WRAPPER}".lstrip("."): parent for parent in wrapping}
        counters = {f"{parent}.{COUNTER}".lstrip(".") for parent in wrapping} & names.keys()
        num_left_out += len(counters)
        if not wrapping:
            break
        names = {_without(name, inside): old for name, old in names.items() if name not in counters}
    if len(names) + num_left_out < len(stored):
        raise ConversionError(f"{called} holds a tensor twice, with and without what a wrapper adds to its name.")
    return names


def _without(name: str, inside: Mapping[str, str]) -> str:
    """A name without its first wrapper."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        wrapper = ".".join(parts[:depth])
        if wrapper in inside:
            return ".".join(filter(None, (inside[wrapper], *parts[depth:])))
    return name
