"""`vitreg pull`."""

from vitreg_hub.console import hide_loading, show_transfers


def run(repo: str, folder: str) -> None:
    """Fetch a published bundle into a new folder.

    Args:
        repo: org/name or org/name@revision
        folder: must not exist
    """
    from vitreg_hub.hub.publish import pull

    hide_loading()
    show_transfers()
    print(pull(repo, folder))
