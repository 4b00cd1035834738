"""Pushes from other processes: what runs there, and a server of processes in which this package is imported already."""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

from huggingface_hub import constants

from vitreg_hub import hub
from vitreg_hub.bundle.doors import DOORS
from vitreg_hub.errors import HubError


def processes() -> ForkServerContext:
    """Where processes come from that share nothing with this one, and start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def push_from_here(endpoint: str, token: str, cache: str, folder: str, repo_id: str, tries: int = 1, **options) -> str:
    """Push a bundle, again where another was faster; the id of the commit, or the sentence why there is none."""
    os.environ["HF_TOKEN"] = token
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, cache
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    hub.verify = lambda folder: dict.fromkeys(DOORS, 0.0)  # its doors take seconds, and other tests open them
    for left in reversed(range(tries)):
        try:
            return hub.push(folder, repo_id, **options).commit
        except HubError as error:
            if not left or "someone else pushed" not in str(error):
                return str(error)
    raise ValueError("at least one try")


def push_one(arguments: dict) -> str:
    """`push_from_here` for a pool."""
    return push_from_here(**arguments)
