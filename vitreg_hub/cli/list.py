"""`vitreg list`."""

import fnmatch

from vitreg_hub.arch import ARCHS
from vitreg_hub.cli.values import print_table
from vitreg_hub.errors import VitregError
from vitreg_hub.tags import tags


def run(pattern: str = "*", *, hub: bool = False) -> None:
    """Print the table of architectures, or the published models.

    Args:
        pattern: shell-style pattern of names
        hub: published models instead of architectures
    """
    print_table(_published(pattern) if hub else _architectures(pattern))


def _architectures(pattern: str) -> list[tuple[str, ...]]:
    chosen = [spec for name, spec in ARCHS.items() if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        hint = f"'*{pattern}*' would, and " if any(pattern in name for name in ARCHS) else ""
        raise VitregError(f"no architecture matches {pattern!r}; {hint}`vitreg list` prints all {len(ARCHS)}.")
    rows = [("name", "params", "width/depth/heads", "patch", "size", "tags")]
    for spec in chosen:
        shape = f"{spec.embed_dim}/{spec.depth}/{spec.num_heads}"
        params = f"{spec.num_params / 1e6:.1f}M"
        rows.append((spec.name, params, shape, str(spec.patch_size), str(spec.img_size), ", ".join(tags(spec.name))))
    return rows


def _published(pattern: str) -> list[tuple[str, ...]]:
    from vitreg_hub.hub.listing import list_models

    models = list_models()
    chosen = [m for m in models if fnmatch.filter((m.repo_id, m.repo_id.split("/")[-1]), pattern)]
    if not chosen:
        raise VitregError(f"none of the {len(models)} published models matches {pattern!r}.")
    rows = [("repository", "architecture", "license", "downloads", "likes", "updated")]
    for model in chosen:
        arch = next((tag for tag in model.tags if tag in ARCHS), "?")
        updated = f"{model.last_modified:%Y-%m-%d}" if model.last_modified else "?"
        if model.private:
            updated += " (private)"
        rows.append((model.repo_id, arch, model.license or "unknown", str(model.downloads), str(model.likes), updated))
    return rows
