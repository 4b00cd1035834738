"""Several processes that push at once lose nothing, and one that is killed leaves the old state or the new one."""

import copy
import json
import os
import signal
import threading
from contextlib import suppress

import pytest
from hub_server import Drop
from hub_state import HubError
from models import random_bundle
from processes import processes
from pushers import push, push_from_here, push_one

REPO = "lab/model"
REGISTERS = (1, 2, 4, 8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four bundles that differ."""
    root = tmp_path_factory.mktemp("bundles")
    return [random_bundle(f"vit_nano_reg{count}").save(root / str(count)) for count in REGISTERS]


@pytest.fixture
def push_all(hub, folders, tmp_path):
    """Push all bundles at once, each from a process of its own; ids of commits, or sentences."""

    def push_them(*, branches=("main",) * 4, tries=1):
        told = dict(endpoint=hub.endpoint, token="hf_good", repo_id=REPO, tries=tries)
        arguments = [
            told | dict(cache=str(tmp_path / f"cache{i}"), folder=str(folder), branch=branch)
            for i, (folder, branch) in enumerate(zip(folders, branches, strict=True))
        ]
        with processes().Pool(4) as pool:
            return pool.map(push_one, arguments, chunksize=1)

    return push_them


def together(part):
    """A hook that keeps the first four requests of a kind until all have come."""
    barrier, left = threading.Barrier(4), [4]

    def hook(request):
        if request.command == "POST" and part in request.path and left[0]:
            barrier.wait(60)
            left[0] = 0

    return hook


def holds(files, folder):
    """Whether a commit's files are those of one bundle, none mixed with another's."""
    if not {"config.json", "model.safetensors"} <= files.keys():
        return False
    config = json.loads(files["config.json"])
    config["vitreg"]["provenance"].pop("doors")
    return (
        config == json.loads((folder / "config.json").read_bytes())
        and files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    )


def test_of_four_at_once_one_wins_and_three_leave_nothing(hub, folders, push_all, tmp_path):
    first = push(random_bundle("vit_nano_reg16").save(tmp_path / "first"), REPO)
    hub.fault = together("/commit/main")
    outcomes = push_all()
    repo = hub.repos[REPO]
    winners = [i for i, outcome in enumerate(outcomes) if outcome == repo.branches["main"]]
    assert len(winners) == 1
    assert len(repo.commits) == 3
    assert repo.commits[-1].parent == first.commit
    assert holds(repo.files(), folders[winners[0]])
    lost = [outcome for i, outcome in enumerate(outcomes) if i not in winners]
    assert lost == 3 * [lost[0]]
    assert lost[0].startswith(
        "someone else pushed to lab/model (main) meanwhile: nothing of this push is there, run it"
    )


def test_four_that_try_again_are_all_in_the_history(hub, folders, push_all):
    hub.fault = together("/repos/create")  # and none of them stumbles over the repository that another made
    outcomes = push_all(tries=4)
    history = hub.repos[REPO].history("main")
    assert {commit.oid for commit in history[:-1]} == set(outcomes)
    assert len(history) == len(hub.repos[REPO].commits) == 5
    for outcome, folder in zip(outcomes, folders, strict=True):
        assert holds(hub.repos[REPO].files(outcome), folder)


def test_four_branches_do_not_disturb_each_other(hub, folders, push_all):
    branches = ("main", "best", "runs/a", "runs/b")
    hub.fault = together("/commit/")
    outcomes = push_all(branches=branches)
    assert dict(zip(branches, outcomes, strict=True)) == hub.repos[REPO].branches
    for branch, folder in zip(branches, folders, strict=True):
        assert holds(hub.repos[REPO].files(branch), folder)


def kill_after(hub, number, **arguments):
    """Push in a process that is killed when the server has handled so many requests, before it gets the last reply.

    A kill before the next request leaves the same state, for in between it asks for nothing.
    """
    process = processes().Process(target=push_from_here, kwargs=arguments)
    started, handled = threading.Event(), 0

    def hook(request):
        nonlocal handled
        started.wait(60)
        handled += 1
        if handled < number:
            return
        if handled == number:
            with suppress(HubError):
                hub.respond(request)
            os.kill(process.pid, signal.SIGKILL)
        raise Drop

    hub.fault = hook
    process.start()
    started.set()
    process.join(60)
    hub.fault = lambda request: None
    return process.exitcode


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_push_that_is_killed_at_any_request_leaves_the_old_state_or_the_new(hub, folders, tmp_path, exists, every):
    old, new = folders[:2]
    if exists:
        push(old, REPO)
    before, asked = copy.deepcopy(hub.repos), len(hub.requests)
    told = dict(endpoint=hub.endpoint, token="hf_good", folder=str(new), repo_id=REPO, tag="v1")
    push_from_here_in_a_process(cache=str(tmp_path / "whole"), **told)
    num_requests = len(hub.requests) - asked
    assert num_requests >= 8
    states = []
    for number in range(num_requests, 0, -every):  # the last ones come after the commit
        hub.repos = copy.deepcopy(before)
        assert kill_after(hub, number, cache=str(tmp_path / f"cache{number}"), **told) == -signal.SIGKILL
        repo = hub.repos.get(REPO)
        files = repo.files() if repo else {}
        if holds(files, new):
            states.append("new")
            assert len(repo.commits) == 2 + exists
        else:
            states.append("old")
            assert holds(files, old) if exists else files.keys() <= {".gitattributes"}
            assert not repo or (len(repo.commits) == 1 + exists and not repo.tags)
        commit = push(new, REPO, tag="v1").commit  # what the user does next
        repo = hub.repos[REPO]
        assert holds(repo.files(), new)
        assert (repo.branches, repo.tags, len(repo.commits)) == ({"main": commit}, {"v1": commit}, 2 + exists)
    assert states == sorted(states)  # "old" until the commit, "new" from there on
    assert set(states) == {"old", "new"}


def push_from_here_in_a_process(**arguments):
    process = processes().Process(target=push_from_here, kwargs=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == 0
