"""Bounds of pickles: what a small file may ask for is counted before anything is made of it."""

import pickletools
from typing import BinaryIO

from vitreg_hub.errors import ConversionError

MAX_TENSORS = 10_000
"""Averaged and raw weights of a network of 300 blocks, with Adam's two moments; torch takes 0.1 ms for each."""
MAX_STEPS = 1_000_000
"""A tensor takes 30 steps of the pickle machine."""
MAX_TUPLES = 16
"""Tuples within tuples. Hashing, comparing or printing one that holds another twice takes twice as long."""

MAKE_TUPLE = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
CALL = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD", "BINPERSID"}
"""What may hand on a tuple that it was given."""
POPS_MARK = pickletools.markobject


def require_bounded_pickle(file: BinaryIO, *, called: str, pickles: int = 1) -> None:
    """Refuse pickles that take longer or nest deeper than those of any ViT.

    Raises:
        ConversionError: They do.
        ValueError: They are damaged.
    """
    steps = tensors = 0
    for _ in range(pickles):
        depths: list[int] = []  # of the tuples in each value on the machine's stack; -1 is a mark
        memo: dict[int, int] = {}
        for opcode, argument, _ in pickletools.genops(file):
            steps, tensors = steps + 1, tensors + (opcode.name in ("BINPERSID", "PERSID"))
            depth = _step(opcode, argument, depths, memo)
            if max(steps / MAX_STEPS, tensors / MAX_TENSORS, depth / MAX_TUPLES) > 1:
                raise ConversionError(
                    f"{called} holds more than any ViT needs ({MAX_TENSORS} tensors, tuples {MAX_TUPLES} deep, "
                    f"{MAX_STEPS} steps to read them): save the model's state_dict alone."
                )


def _step(opcode: pickletools.OpcodeInfo, argument: object, depths: list[int], memo: dict[int, int]) -> int:
    """Follow one step of the machine; returns how deep the tuples in the value on top of the stack are."""
    name, before = opcode.name, opcode.stack_before
    if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = depths[-1] if depths else 0
        return 0
    if name in ("GET", "BINGET", "LONG_BINGET"):
        depths.append(memo.get(int(str(argument)), 0))
        return 0
    if name == "DUP":
        depths += depths[-1:]
        return 0
    if name == "MARK":
        depths.append(-1)
        return 0
    taken: list[int] = []
    if POPS_MARK in before:
        while depths and (last := depths.pop()) >= 0:
            taken.append(last)
        before = before[: before.index(POPS_MARK)]
    for _ in before:
        taken.append(depths.pop() if depths else 0)
    depth = max(taken, default=0) + 1 if name in MAKE_TUPLE else max(taken, default=0) if name in CALL else 0
    depths += [depth] * len(opcode.stack_after)
    return depth
