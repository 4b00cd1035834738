"""Processes that share nothing with this one and yet start at once: forked off one that has imported the package."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext

import torch

PRELOADED = ["vitreg_hub.hub.publish", "vitreg_hub.training.loop"]
"""Modules that are installed: the server does not find those of the tests."""


def processes() -> ForkServerContext:
    """Where such processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_in_two(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in two of them, with 0 or 1 before the arguments."""
    processes()
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")
