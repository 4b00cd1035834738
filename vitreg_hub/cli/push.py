"""`vitreg push`."""

from typing import TYPE_CHECKING, Any

from vitreg_hub.console import hide_loading, show_transfers
from vitreg_hub.errors import printable

if TYPE_CHECKING:
    from vitreg_hub.hub.publish import Pushed, PushPlan


def run(
    folder: str,
    repo: str,
    *,
    private: bool = False,
    branch: str = "main",
    create_pr: bool = False,
    tag: str | None = None,
    license: str | None = None,
    dry_run: bool = False,
) -> None:
    """Verify a bundle and publish it in one commit.

    Args:
        folder: folder of a bundle, or the name of weights in this package
        repo: org/name; made if it does not exist
        private: only its owner sees a new repository
        branch: branch of the commit; a new one starts from main
        create_pr: open a pull request instead
        tag: name for the commit, such as v1
        license: of the weights, if the bundle states none, or a non-commercial one to agree to
        dry_run: check everything, list what would be sent, send nothing
    """
    from vitreg_hub.hub import publish

    hide_loading()
    show_transfers()
    options: dict[str, Any] = dict(private=private, branch=branch, create_pr=create_pr, tag=tag, license=license)
    if dry_run:
        _print_plan(publish.plan(folder, repo, **options))
        return
    pushed = publish.push(folder, repo, **options)
    if pushed.text_tower:
        _print_pushed(pushed.text_tower)
    _print_pushed(pushed)  # the bundle's address is the last line


def _print_pushed(pushed: "Pushed") -> None:
    done = [*pushed.sent, *(f"deleted {name}" for name in pushed.deleted)]
    print(f"{pushed.repo_id}: {', '.join(done) or 'nothing had changed'}")
    if pushed.pull_request:
        print(f"pull request {pushed.pull_request}")
    print(pushed.url)


def _print_plan(plan: "PushPlan") -> None:
    made = " (new)" if plan.makes_repository else " (new branch)" if plan.makes_branch else ""
    print(f"{plan.repo_id}, branch {plan.branch}{made}, license {plan.license or 'unknown'}")
    for file in plan.files:
        print(f"  {file.state.ljust(9)}  {file.size:>13,} bytes  {file.name}")
    if plan.left_out:
        print(f"  left out: {printable(', '.join(plan.left_out))}")
    if plan.text_tower:
        _print_plan(plan.text_tower)
