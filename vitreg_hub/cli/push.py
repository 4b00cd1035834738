"""`vitreg push`."""

from typing import TYPE_CHECKING, Any

from vitreg_hub.console import hide_loading, show_transfers

if TYPE_CHECKING:
    from vitreg_hub.hub.publish import PushPlan


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
        private: a new repository can be seen by its owner alone
        branch: where the commit goes; a new one starts from main
        create_pr: open a pull request instead
        tag: name for the commit, such as v1
        license: of the weights, where the bundle does not tell, or a non-commercial one to agree to
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
    for done in filter(None, (pushed.text_tower, pushed)):  # the bundle's address is the last line
        did = (*done.sent, *(f"deleted {name}" for name in done.deleted))
        print(f"{done.repo_id}: {', '.join(did) or 'nothing had changed'}")
        if done.pull_request:
            print(f"pull request {done.pull_request}")
        print(done.url)


def _print_plan(plan: "PushPlan") -> None:
    made = " (new)" if plan.makes_repository else " (new branch)" if plan.makes_branch else ""
    print(f"{plan.repo_id}, branch {plan.branch}{made}, license {plan.license or 'unknown'}")
    for file in plan.files:
        print(f"  {file.state.ljust(9)}  {file.size:>13,} bytes  {file.name}")
    if plan.left_out:
        print(f"  left out: {', '.join(plan.left_out)}")
    if plan.text_tower:
        _print_plan(plan.text_tower)
