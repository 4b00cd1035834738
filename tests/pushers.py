"""Pushes that skip the doors, which take seconds and which other tests open: from here and from other processes."""

import os
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from vitreg_hub import hub
from vitreg_hub.bundle.doors import DOORS
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import HubError


def not_opened(folder: Path, *, bundle: ModelBundle) -> dict[str, float]:
    """What `doors.verify` finds, without a look."""
    return dict.fromkeys(DOORS, 0.0)


push = partial(hub.push, verify=not_opened)
plan = partial(hub.plan, verify=not_opened)


def push_from_here(endpoint: str, token: str, cache: str, folder: str, repo_id: str, tries: int = 1, **options) -> str:
    """Push a bundle, again where another was faster; the id of the commit, or the sentence why there is none."""
    os.environ["HF_TOKEN"] = token
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.ENDPOINT, constants.HF_HUB_CACHE = endpoint, cache
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for left in reversed(range(tries)):
        try:
            return push(folder, repo_id, **options).commit
        except HubError as error:
            if not left or "someone else pushed" not in str(error):
                return str(error)
    raise ValueError("at least one try")


def push_one(arguments: dict) -> str:
    """`push_from_here` for a pool."""
    return push_from_here(**arguments)
