"""Published models, as the Hub lists them."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import huggingface_hub as hf

from vitreg_hub.arch import get_arch
from vitreg_hub.remote.client import hub_errors, patiently, reach

TAG = "vitreg"
"""On every card that this package writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedModel:
    """A model in the Hub's list."""

    repo_id: str
    license: str | None
    tags: tuple[str, ...]
    downloads: int
    likes: int
    last_modified: datetime | None
    private: bool


def list_models(
    *, author: str | None = None, search: str | None = None, arch: str | None = None, limit: int | None = None
) -> tuple[PublishedModel, ...]:
    """Find published models, most downloaded first.

    Args:
        search: Part of the repository's name.

    Raises:
        HubError: The Hub refuses or cannot be reached.
        UnknownArchError: No such architecture.
    """
    tags = [TAG] if arch is None else [TAG, get_arch(arch).name]
    shown: list[Any] = ["tags", "downloads", "likes", "lastModified", "private"]
    ask = partial(hf.HfApi(library_name="vitreg_hub").list_models, sort="downloads", expand=shown)
    with hub_errors("the list of models"):
        reach()
        found = patiently(lambda: list(ask(filter=tags, author=author, search=search, limit=limit)))
    return tuple(
        PublishedModel(
            repo_id=model.id,
            license=next((t.removeprefix("license:") for t in model.tags or () if t.startswith("license:")), None),
            tags=tuple(model.tags or ()),
            downloads=model.downloads or 0,
            likes=model.likes or 0,
            last_modified=model.last_modified,
            private=bool(model.private),
        )
        for model in found
    )
