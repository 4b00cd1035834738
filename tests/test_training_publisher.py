"""Publishing while a run goes on, with huggingface_hub's client against the stand-in Hub."""

import logging
import os
import random
import threading

import pytest
import torch
from hub_server import Drop
from models import random_bundle

from vitreg_hub import hub as publishing
from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.training.publisher import Publisher, push_apart

REPO = "lab/trained"


@pytest.fixture
def push_here(monkeypatch):
    """`hub.push` in this process and without the doors, which take seconds."""
    monkeypatch.setattr("vitreg_hub.hub.verify", lambda folder: {})
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client waits too

    def push(folder, repo_id, private):
        return publishing.push(folder, repo_id, private=private)

    return push


class Gated:
    """Sends nothing until it is told to, and keeps what it was given."""

    def __init__(self, *outcomes):
        self.outcomes, self.weights, self.started, self.go = list(outcomes), [], threading.Event(), threading.Event()

    def __call__(self, folder, repo_id, private):
        self.started.set()
        assert self.go.wait(60)
        self.weights.append((folder / "model.safetensors").read_text())
        outcome = self.outcomes.pop(0) if self.outcomes else f"commit of {self.weights[-1]}"
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def checkpoint(root, name):
    folder = root / name
    (folder / "state").mkdir(parents=True)
    (folder / "model.safetensors").write_text(name)
    (folder / "state" / "optimizer.safetensors").write_text("much")
    return folder


def files_below(root):
    return sorted(path.name for path in root.rglob("*"))


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_good")


def test_bundle_arrives_though_its_folder_is_gone(hub, push_here, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub.training")
    saved = random_bundle().save(tmp_path / "run" / "model")
    weights = (saved / "model.safetensors").read_bytes()
    gate = threading.Event()

    def push(*given):
        assert gate.wait(60)
        return push_here(*given)

    publisher = Publisher(REPO, private=True, push=push)
    publisher.submit(saved)
    for file in saved.iterdir():
        file.unlink()
    gate.set()
    (commit,) = publisher.close()
    assert commit.endswith(hub.repos[REPO].commits[-1].oid)
    assert hub.repos[REPO].files()["model.safetensors"] == weights
    assert hub.repos[REPO].private
    assert (publisher.pushed, publisher.error) == (True, None)
    assert caplog.messages == [f"published {commit}"]
    assert files_below(tmp_path / "run") == ["model"]


def test_failures_that_pass_are_tried_again(hub, push_here, tmp_path, caplog):
    faults = [(503, {}, b""), Drop(), (500, {}, b"")]

    def fault(request):
        if "/commit/" in request.path and faults:
            found = faults.pop()
            if isinstance(found, Drop):
                raise found
            return found
        return None

    hub.fault = fault
    with Publisher(REPO, push=push_here, waits=(0,) * 6) as publisher:
        publisher.submit(random_bundle().save(tmp_path / "model"))
    assert not faults
    assert publisher.pushed
    assert publisher.error is None
    assert len(hub.repos[REPO].commits) == 2  # the Hub's own first one, and ours
    assert [message.partition(":")[0] for message in caplog.messages if "publishing" in message] == [
        f"publishing to {REPO} failed and is tried again"
    ]


def test_failure_that_stays_is_said_and_the_next_bundle_is_sent(hub, push_here, tmp_path, caplog):
    saved = random_bundle().save(tmp_path / "model")
    hub.fault = lambda request: (403, {}, b"") if request.command == "POST" else None
    publisher = Publisher(REPO, push=push_here, waits=(0, 0))
    publisher.submit(saved)
    publisher._uploads[0].future.result()
    assert not publisher.pushed
    assert "may not do this" in publisher.error
    assert caplog.messages[-1] == f"publishing to {REPO} failed, the run goes on: {publisher.error}"
    assert len([path for _, path, _ in hub.requests if path == "/api/repos/create"]) == 3
    hub.fault = lambda request: None
    publisher.submit(saved)
    assert len(publisher.close()) == 1
    assert publisher.pushed
    assert publisher.error is None


def test_waits_grow_and_end(token, tmp_path, monkeypatch):
    waited = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return self.is_set()

    monkeypatch.setattr("vitreg_hub.training.publisher.Event", Event)
    gated = Gated(*[HubError("down.")] * 99)
    gated.go.wait = lambda timeout: True
    with Publisher(REPO, push=gated) as publisher:
        publisher.submit(checkpoint(tmp_path, "a"))
    assert waited == [1, 2, 4, 8, 16, 32]
    assert len(gated.weights) == 7
    assert (publisher.pushed, publisher.error) == (False, "down.")


def test_newest_wins(token, tmp_path):
    gated = Gated()
    publisher = Publisher(REPO, push=gated)
    publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.started.wait(60)
    for name in "bcd":
        publisher.submit(checkpoint(tmp_path, name))
    gated.go.set()
    assert publisher.close() == ("commit of a", "commit of d")
    assert gated.weights == ["a", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_newer_bundle_ends_the_wait_of_a_failed_one(token, tmp_path):
    gated = Gated(HubError("down."))
    publisher = Publisher(REPO, push=gated, waits=(3600,))
    publisher.submit(checkpoint(tmp_path, "a"))
    gated.go.set()
    assert gated.started.wait(60)
    publisher.submit(checkpoint(tmp_path, "b"))
    assert publisher.close() == ("commit of b",)
    assert gated.weights == ["a", "b"]


def test_copies_share_the_weights_and_leave_nothing(token, tmp_path):
    folder, gated = checkpoint(tmp_path, "a"), Gated(BundleError("a door is shut."))
    publisher = Publisher(REPO, push=gated, waits=())
    publisher.submit(folder)
    assert os.stat(folder / "model.safetensors").st_nlink == 2
    gated.go.set()
    assert publisher.close() == ()
    assert publisher.error == "a door is shut."
    assert os.stat(folder / "model.safetensors").st_nlink == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_that_cannot_be_copied_stops_nothing(token, tmp_path, caplog):
    publisher = Publisher(REPO, push=Gated())
    publisher.submit(tmp_path / "nothing")
    assert publisher.close() == ()
    assert "nothing cannot be copied: No such file" in publisher.error
    assert not list(tmp_path.iterdir())


def test_file_systems_without_links_get_copies(token, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("not here")

    monkeypatch.setattr("os.link", refuse)
    gated = Gated()
    gated.go.set()
    with Publisher(REPO, push=gated) as publisher:
        publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.weights == ["a"]


def test_bugs_are_not_swallowed(token, tmp_path):
    gated = Gated(ZeroDivisionError())
    publisher = Publisher(REPO, push=gated)
    publisher.submit(checkpoint(tmp_path, "a"))
    gated.go.set()
    with pytest.raises(ZeroDivisionError):
        publisher.close()


def test_what_cannot_be_published_is_refused_at_once(hub, monkeypatch):
    with pytest.raises(HubError, match="is no repository id"):
        Publisher("too/many/parts")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token"):
        Publisher(REPO)
    assert not hub.requests


def test_run_is_not_disturbed_by_a_real_upload(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as in one of several processes: the upload is none of them
    monkeypatch.setenv("RANK", "0")
    saved = random_bundle().save(tmp_path / "model")
    states = torch.get_rng_state(), random.getstate()
    with Publisher(REPO) as publisher:
        publisher.submit(saved)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert publisher.pushed
    assert hub.repos[REPO].files()["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_a_real_upload_says_in_its_sentence_why_it_failed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    saved = random_bundle().save(tmp_path / "model")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(HubError, match=r"^[^\n]*R6: pytorch_model\.bin is a second weights file[^\n]*$"):
        push_apart(saved, REPO, False)
    assert not hub.repos
