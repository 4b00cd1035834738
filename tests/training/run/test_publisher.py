"""Publishing while a run goes on and at its end, with huggingface_hub's client against the stand-in Hub."""

import hashlib
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from hub_faults import DROP, HTML, Fault, writes
from huggingface_hub import HfApi
from models import random_bundle
from pushers import not_opened
from safetensors.torch import load_file
from training_files import write_folder
from training_runs import TINY

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, HubError, HubRefusedError, LicenseError, VitregError
from vitreg_hub.hub import Pushed
from vitreg_hub.images.embedded import digits
from vitreg_hub.training.loop import Instruments, train
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import DataSettings
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.run.publisher import Publisher
from vitreg_hub.training.run.push_apart import NotPushed, outcome_of_push, patience, push_apart
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.tasks.distill.settings import Distill

pytestmark = pytest.mark.usefixtures("warm")

REPO = "lab/trained"


@pytest.fixture
def push_here(monkeypatch):
    """A push in this process and without the doors, which take seconds."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client waits too
    return partial(outcome_of_push, verify=not_opened)


def pushed(url):
    return Pushed(repo_id=REPO, commit=url, url=url, private=False)


def failed(why):
    return NotPushed(kind="failed", why=why)


def refused(why):
    return NotPushed(kind="refused", why=why)


class Gated:
    """Sends nothing until it is told to, and keeps what it was given."""

    def __init__(self, *outcomes):
        self.outcomes, self.weights, self.started, self.go = list(outcomes), [], threading.Event(), threading.Event()
        self.branches, self.files = [], []

    def __call__(self, folder, repo_id, *, branch, private, license):
        self.started.set()
        assert self.go.wait(60)
        self.branches.append(branch)
        self.files.append({str(path.relative_to(folder.parent)) for path in folder.parent.rglob("*")})
        self.weights.append((folder / "model.safetensors").read_text())
        outcome = self.outcomes.pop(0) if self.outcomes else pushed(f"commit of {self.weights[-1]}")
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

    def push(*given, **options):
        assert gate.wait(60)
        return push_here(*given, **options)

    publisher = Publisher(REPO, private=True, license="mit", push=push)
    publisher.submit(saved)
    for file in saved.iterdir():
        file.unlink()
    gate.set()
    (commit,) = publisher.close().values()
    assert commit.endswith(hub.repos[REPO].commits[-1].oid)
    assert hub.repos[REPO].files()["model.safetensors"] == weights
    assert hub.repos[REPO].private
    assert not publisher.errors
    assert caplog.messages == [f"published {commit}"]
    assert files_below(tmp_path / "run") == ["model"]


def test_failures_that_pass_are_tried_again(hub, push_here, tmp_path, caplog):
    faults = [(503, {}, b"")] * 4  # as many as one upload takes before it gives up

    def fault(request):
        return faults.pop() if request.command == "POST" and faults else None

    hub.fault = fault
    with Publisher(REPO, license="mit", push=push_here, waits=(0,) * 6) as publisher:
        publisher.submit(random_bundle().save(tmp_path / "model"))
    assert not faults
    assert not publisher.errors
    assert publisher.close().keys() == {"main"}
    assert len(hub.repos[REPO].commits) == 2  # the Hub's own first one, and ours
    assert [message.partition(":")[0] for message in caplog.messages if "publishing" in message] == [
        f"publishing to {REPO}@main failed and is tried again"
    ]


def test_failure_that_stays_is_said_and_the_next_bundle_is_sent(hub, push_here, tmp_path, caplog):
    saved = random_bundle().save(tmp_path / "model")
    hub.fault = lambda request: (403, {}, b"") if request.command == "POST" else None
    publisher = Publisher(REPO, license="mit", push=push_here, waits=(0, 0))
    publisher.submit(saved).result()
    assert "may not do this" in publisher.errors["main"]
    assert caplog.messages[-1] == f"publishing to {REPO}@main failed, the run goes on: {publisher.errors['main']}"
    assert len([path for _, path, _ in hub.requests if path == "/api/repos/create"]) == 1  # refused
    hub.fault = lambda request: None
    publisher.submit(saved)
    assert len(publisher.close()) == 1
    assert not publisher.errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((error, "refused") for error in (BundleError, HubRefusedError, LicenseError, VitregError)),
        (HubError, "failed"),
    ],
)
def test_errors_tell_whether_another_try_would_change_them(error, kind, token, old):
    def shut(folder, **options):
        raise error("a door is shut.")

    outcome = outcome_of_push(old, REPO, verify=shut)
    assert outcome == NotPushed(kind=kind, why="a door is shut.")


def test_failure_that_no_try_would_change_is_tried_once(token, tmp_path, caplog):
    gated = Gated(refused("a door is shut."))
    gated.go.set()
    with Publisher(REPO, push=gated, waits=(3600,)) as publisher:
        publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.weights == ["a"]
    assert publisher.errors == {"main": "a door is shut."}
    assert caplog.messages == [f"publishing to {REPO}@main failed, the run goes on: a door is shut."]


def test_a_process_that_cannot_be_started_is_tried_again(token, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no python"))
    outcome = push_apart(checkpoint(tmp_path, "a"), REPO, branch="main", private=False, license=None)
    assert outcome == failed("its process cannot be started: No such file or directory.")
    gated = Gated(outcome)
    gated.go.set()
    with Publisher(REPO, push=gated, waits=(0,)) as publisher:
        publisher.submit(tmp_path / "a")
    assert gated.weights == ["a", "a"]
    assert (publisher.close(), publisher.errors) == ({"main": "commit of a"}, {})


def test_waits_grow_and_end(token, tmp_path):
    waited = []
    gated = Gated(*[failed("down.")] * 99)
    gated.go.set()
    with Publisher(REPO, push=gated, pause=lambda outdated, seconds: waited.append(seconds)) as publisher:
        publisher.submit(checkpoint(tmp_path, "a"))
    assert waited == [1, 2, 4, 8, 16, 32]
    assert len(gated.weights) == 7
    assert (publisher.close(), publisher.errors) == ({}, {"main": "down."})


def test_newest_wins(token, tmp_path):
    gated = Gated()
    publisher = Publisher(REPO, push=gated)
    publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.started.wait(60)
    for name in "bcd":
        publisher.submit(checkpoint(tmp_path, name))
    gated.go.set()
    assert publisher.close() == {"main": "commit of d"}
    assert gated.weights == ["a", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d"]


def test_newest_wins_on_its_own_branch_only(token, tmp_path):
    gated = Gated()
    publisher = Publisher(REPO, push=gated)
    publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.started.wait(60)
    for name, branch in (("b", "main"), ("c", "best"), ("d", "best"), ("e", "main")):
        publisher.submit(checkpoint(tmp_path, name), branch=branch)
    gated.go.set()
    assert publisher.close() == {"main": "commit of e", "best": "commit of d"}
    assert list(zip(gated.weights, gated.branches, strict=True)) == [("a", "main"), ("d", "best"), ("e", "main")]


def test_one_branch_can_fail_alone(token, tmp_path):
    gated = Gated(pushed("commit of a"), refused("a door is shut."))
    gated.go.set()
    publisher = Publisher(REPO, push=gated, waits=())
    publisher.submit(checkpoint(tmp_path, "a"))
    publisher.submit(checkpoint(tmp_path, "b"), branch="best")
    assert publisher.close() == {"main": "commit of a"}
    assert publisher.errors == {"best": "a door is shut."}


def test_text_tower_goes_along_and_a_state_does_not(token, tmp_path):
    gated = Gated()
    folder = checkpoint(tmp_path, "a")
    (folder / "curves.png").touch()
    tower = tmp_path / "a-open_clip"
    tower.mkdir()
    (tower / "open_clip_model.safetensors").write_text("both")
    with Publisher(REPO, push=gated) as publisher:
        publisher.submit(folder)
        shutil.rmtree(tower)
        gated.go.set()
    files = {"a/model.safetensors", "a/curves.png", "a-open_clip/open_clip_model.safetensors"}
    assert gated.files == [{"a", "a-open_clip", *files}]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_newer_bundle_ends_the_wait_of_a_failed_one(token, tmp_path):
    gated = Gated(failed("down."))
    publisher = Publisher(REPO, push=gated, waits=(3600,))
    publisher.submit(checkpoint(tmp_path, "a"))
    gated.go.set()
    assert gated.started.wait(60)
    publisher.submit(checkpoint(tmp_path, "b"))
    assert publisher.close() == {"main": "commit of b"}
    assert gated.weights == ["a", "b"]


def test_copies_share_the_weights_and_leave_nothing(token, tmp_path):
    folder, gated = checkpoint(tmp_path, "a"), Gated(refused("a door is shut."))
    publisher = Publisher(REPO, push=gated, waits=())
    publisher.submit(folder)
    assert os.stat(folder / "model.safetensors").st_nlink == 2
    gated.go.set()
    assert publisher.close() == {}
    assert publisher.errors == {"main": "a door is shut."}
    assert os.stat(folder / "model.safetensors").st_nlink == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folder_that_cannot_be_copied_stops_nothing(token, tmp_path, caplog):
    publisher = Publisher(REPO, push=Gated())
    publisher.submit(tmp_path / "nothing")
    assert publisher.close() == {}
    assert "nothing cannot be copied: No such file" in publisher.errors["main"]
    assert not list(tmp_path.iterdir())


def test_older_bundle_does_not_stand_for_a_newer_one_that_failed(token, tmp_path):
    gated = Gated()
    publisher = Publisher(REPO, push=gated)
    publisher.submit(checkpoint(tmp_path, "a"))
    assert gated.started.wait(60)
    publisher.submit(tmp_path / "nothing")
    gated.go.set()
    assert publisher.close() == {}
    assert publisher.commits == {"main": "commit of a"}
    assert "cannot be copied" in publisher.errors["main"]


def test_a_bug_is_told_though_newer_bundles_came_through(token, tmp_path):
    gated = Gated(pushed("commit of a"), ZeroDivisionError())
    gated.go.set()
    publisher = Publisher(REPO, push=gated)
    for name, bug in (("a", None), ("b", ZeroDivisionError), ("c", None)):
        assert isinstance(publisher.submit(checkpoint(tmp_path, name)).exception(60), bug or type(None))
    assert gated.weights == ["a", "b", "c"]
    with pytest.raises(ZeroDivisionError):
        publisher.close()


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
    with pytest.raises(HubError, match="is not a repository id"):
        Publisher("too/many/parts")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token"):
        Publisher(REPO)
    assert not hub.requests


def test_run_is_not_disturbed_by_a_real_upload(hub, tmp_path, monkeypatch):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**launched, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)  # as in one of several processes, for none of which the upload waits
    saved = random_bundle().save(tmp_path / "model")
    states = torch.get_rng_state(), random.getstate()
    with Publisher(REPO, license="mit") as publisher:
        publisher.submit(saved, branch="best")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert publisher.close().keys() == {"best"}
    assert hub.repos[REPO].files("best")["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_a_real_upload_says_in_its_sentence_why_it_failed(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    saved = random_bundle().save(tmp_path / "model")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    outcome = push_apart(saved, REPO, branch="main", private=False, license="mit")
    assert outcome.kind == "refused"
    assert re.fullmatch(r"[^\n]* holds pytorch_model\.bin: [^\n]*", outcome.why)
    (saved / "pytorch_model.bin").unlink()
    outcome = push_apart(saved, REPO, branch="main", private=False, license="mit")
    assert outcome.kind == "refused"
    assert re.fullmatch(r"[^\n]* may not do this with [^\n]*", outcome.why)
    assert not hub.repos


def test_a_process_that_is_killed_is_not_tried_again(tmp_path, monkeypatch):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho a warning >&2\nkill -9 $$\n")
    dies.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(dies))
    outcome = push_apart(checkpoint(tmp_path, "a"), REPO, branch="main", private=False, license=None)
    assert outcome == refused("its process ended with status -9: a warning")


def test_a_push_that_never_ends_is_given_up(tmp_path, monkeypatch):
    stalls = tmp_path / "stalls"
    stalls.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 3600\n")
    stalls.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(stalls))
    outcome = push_apart(checkpoint(tmp_path, "a"), REPO, seconds=1, branch="main", private=False, license=None)
    assert outcome.kind == "refused"
    assert re.fullmatch(r"it was not done after 1 seconds? and was given up: [^\n]*\.", outcome.why)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_ctrl_c_while_waiting_for_an_upload_ends_it(token, tmp_path, monkeypatch, caplog):
    stalls = tmp_path / "stalls"
    stalls.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 3600\n")
    stalls.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(stalls))
    publisher = Publisher(REPO, waits=(3600,))
    publisher.submit(checkpoint(tmp_path, "a"))
    publisher.submit(checkpoint(tmp_path, "b"), branch="best")
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")):
        time.sleep(0.01)
    process = int((tmp_path / "pid").read_text())
    assert os.getpgid(process) != os.getpgid(0)  # Ctrl-C reaches all of a group: the first one must not end it
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        publisher.close()
    publisher.close()
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert not caplog.messages


def test_a_script_without_a_guard_is_not_run_again(hub, tmp_path):
    saved = random_bundle().save(tmp_path / "model")
    script = tmp_path / "train.py"
    script.write_text(
        "from pathlib import Path\nfrom vitreg_hub.training.run.push_apart import push_apart\nprint('once')\n"
        f"print(push_apart(Path({str(saved)!r}), {REPO!r}, branch='main', private=False, license='mit').commit)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.split() == ["once", hub.repos[REPO].branches["main"]]


def test_patience_grows_with_the_files(tmp_path):
    found = []
    for name, size in (("model", 500_000), ("model-open_clip", 1_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(bytes(size))
        found.append(patience(tmp_path / "model"))
    assert found == [1802, 1806]


RUN = replace(
    TINY["supervised"],
    license="mit",
    watch=replace(TINY["supervised"].watch, eval_every=1, save_every=1, keep=9, artifact_images=0),
)
BESIDE = {"recipe.yaml", "metrics.jsonl", "curves.png"}


@pytest.fixture
def falling():
    """A run whose evaluations find less each time: the first one after a step is the best."""
    scores = iter(range(99, 0, -1))
    return Instruments(measure=lambda trainer: {"eval/accuracy": next(scores) / 100})


class Recorder:
    """Sends nothing and keeps what it was given; fails for some branches, from a number of calls on."""

    def __init__(self):
        self.calls, self.fails, self.succeeds, self.private = [], {}, {}, set()

    def __call__(self, folder, repo_id, *, branch, private, license):
        self.private.add(private)
        if branch in self.fails and sum(branch == sent for sent, _, _ in self.calls) >= self.succeeds.get(branch, 0):
            return self.fails[branch]
        step = ModelBundle.load(folder).provenance.run.step
        self.calls.append((branch, step, license))
        assert {path.name for path in folder.iterdir()} >= BESIDE
        assert "state" not in {path.name for path in folder.iterdir()}
        return pushed(f"{repo_id}/commit/{step}")

    def publisher(self, *args, **options):
        return Publisher(*args, **options, waits=(), push=self)


@pytest.fixture
def recorder(token):
    return Recorder()


@pytest.fixture
def recorded(falling, recorder):
    """The same run, which sends to the recorder."""
    return replace(falling, publisher=recorder.publisher)


def test_last_model_goes_to_main_and_the_best_to_its_branch(recorded, recorder, tmp_path):
    result = train(RUN, tmp_path / "run", push=REPO, instruments=recorded)
    assert recorder.calls == [("main", 4, "mit"), ("best", 1, "mit")]
    assert result.commits == {"main": f"{REPO}/commit/4", "best": f"{REPO}/commit/1"}
    again = train(RUN, tmp_path / "run", push=REPO, instruments=recorded)  # of a finished run, once more
    assert again.commits == result.commits
    assert recorder.calls[2:] == recorder.calls[:2]
    assert not [path.name for path in tmp_path.rglob(".*")]


class AtOnce(Publisher):
    """Lets the run wait for every upload, so that none is dropped for a newer one."""

    def submit(self, folder, **options):
        super().submit(folder, **options).result()


@pytest.fixture
def at_once(falling, recorder):
    return replace(falling, publisher=partial(AtOnce, waits=(), push=recorder))


def test_checkpoints_are_published_with_the_best_so_far(recorder, at_once, tmp_path):
    train(RUN, tmp_path / "run", push=REPO, push_every="save", instruments=at_once)
    assert [(branch, step) for branch, step, _ in recorder.calls] == [
        *(("main", 1), ("best", 1), ("main", 2), ("main", 3)),
        *(("main", 4), ("best", 1)),
    ]
    for folder in checkpoints(tmp_path / "run"):
        assert {path.name for path in folder.iterdir()} >= BESIDE


def test_without_evaluations_there_is_one_branch(recorded, tmp_path):
    instruments = replace(recorded, measure=lambda trainer: {})
    assert train(RUN, tmp_path / "run", push=REPO, instruments=instruments).commits == {"main": f"{REPO}/commit/4"}


@pytest.mark.parametrize("older", [False, True])
def test_best_model_that_is_not_on_the_hub_is_said(older, recorder, at_once, tmp_path, caplog):
    recorder.fails, recorder.succeeds = {"best": failed("no space for you.")}, {"best": int(older)}
    result = train(RUN, tmp_path / "run", push=REPO, push_every="save" if older else "end", instruments=at_once)
    assert ("best" in [branch for branch, _, _ in recorder.calls]) == older
    assert result.commits == {"main": f"{REPO}/commit/4"}
    missing = tmp_path / "run" / "best"
    by_hand = f"vitreg push {missing} {REPO} --branch best --license mit"
    assert caplog.messages[-1] == f"{missing} is not on the Hub (no space for you): {by_hand}"


@pytest.mark.parametrize(
    ("fails", "push_every", "says"),
    [
        (("main", "best"), "end", "nothing could be published (no space for you)"),
        (("main",), "end", "MODEL could not be published (no space for you), only the best model on best (lab/1)"),
        (
            ("main",),
            "save",
            "MODEL could not be published (no space for you), only an older checkpoint on main (lab/2) and the best "
            "model on best (lab/1)",
        ),
        (
            ("main", "best"),
            "save",
            "MODEL could not be published (no space for you), only an older checkpoint on main (lab/2)",
        ),
    ],
)
def test_last_model_that_is_not_on_the_hub_ends_the_run_with_an_error(
    fails, push_every, says, recorder, at_once, tmp_path
):
    recorder.fails = {branch: failed("no space for you.") for branch in fails}
    recorder.succeeds = {"main": 2 * (push_every == "save")}
    with pytest.raises(HubError) as error:
        train(RUN, tmp_path / "run", push=REPO, push_every=push_every, private=True, instruments=at_once)
    run = tmp_path / "run"
    by_hand = f"vitreg push {run / 'model'} {REPO} --branch main --private --license mit"
    says = says.replace("MODEL", str(run / "model")).replace("lab/", f"{REPO}/commit/")
    assert str(error.value) == f"{says}: {run} is complete, send it with `{by_hand}`."
    assert (run / "model" / "model.safetensors").exists()
    assert recorder.private == {True}


def test_run_that_is_asked_to_stop_tells_what_it_published(recorder, at_once, tmp_path, monkeypatch):
    do_step = Trainer.do_step

    def stopping(self, step, *args):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return do_step(self, step, *args)

    monkeypatch.setattr(Trainer, "do_step", stopping)
    result = train(RUN, tmp_path / "run", push=REPO, push_every="save", instruments=at_once)
    assert (result.step, result.model) == (2, None)
    assert result.commits == {"main": f"{REPO}/commit/2", "best": f"{REPO}/commit/1"}
    assert recorder.private == {False}


def licensed(start, license, tmp_path):
    """A run with a license of its own, from scratch or from weights under another one."""
    recipe = replace(RUN, license=license, epochs=1)
    if start is None:
        return recipe
    bundle, folder = ModelBundle.load("vit_nano_reg4.digits"), tmp_path / "start"
    replace(bundle, provenance=replace(bundle.provenance, license=start)).save(folder)
    return replace(recipe, model=replace(RUN.model, arch="vit_nano_reg4", start=str(folder)))


@pytest.mark.parametrize(
    ("start", "license", "push", "sentence"),
    [
        (
            None,
            None,
            REPO,
            "no license is stated for the weights of recipe tiny_supervised: give it with --license",
        ),
        ("cc-by-nc-4.0", None, REPO, "is cc-by-nc-4.0, which does not allow every use.*--license cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "mit", REPO, "has the license mit, but model.start .* is under cc-by-nc-4.0: give --license"),
        ("cc-by-nc-4.0", "mit", None, "has the license mit, but model.start .* is under cc-by-nc-4.0: give --license"),
        ("apache-2.0", "mit", None, "has the license mit, but model.start .* is under apache-2.0: give --license"),
        (None, "apache2", None, "apache2 is not how the Hub spells it: did you mean apache-2.0"),
    ],
)
def test_license_is_settled_before_any_training(recorded, start, license, push, sentence, tmp_path):
    recipe = licensed(start, license, tmp_path)
    with pytest.raises(LicenseError, match=sentence) as error:
        train(recipe, tmp_path / "run", push=push, instruments=recorded)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("start", "license", "push", "told"),
    [
        (None, None, None, None),
        (None, "unknown", REPO, None),
        (None, "MIT", REPO, "mit"),
        ("apache-2.0", None, REPO, "apache-2.0"),
        ("cc-by-nc-4.0", None, None, "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", REPO, "cc-by-nc-4.0"),
    ],
)
def test_license_of_a_run(recorded, start, license, push, told, recorder, tmp_path):
    train(licensed(start, license, tmp_path), tmp_path / "run", push=push, instruments=recorded)
    assert ModelBundle.load(tmp_path / "run" / "model").provenance.license == told
    assert recorder.calls == ([("main", 2, license), ("best", 1, license)] if push else [])


def test_a_finished_run_without_a_license_gets_one_when_it_is_published(recorded, tmp_path):
    recipe = licensed(None, None, tmp_path)
    train(recipe, tmp_path / "run", instruments=recorded)
    with pytest.raises(LicenseError, match="give it with --license"):
        train(recipe, tmp_path / "run", push=REPO, instruments=recorded)
    result = train(replace(recipe, license="mit"), tmp_path / "run", push=REPO, instruments=recorded)
    assert result.commits.keys() == {"main", "best"}


def test_a_run_on_the_hub_is_the_run_on_the_disk(hub, falling, tmp_path):
    result = train(replace(RUN, epochs=1), tmp_path / "run", push=REPO, instruments=falling)
    repo = hub.repos[REPO]
    for branch, folder, step in (("main", "model", 2), ("best", "best", 1)):
        files = repo.files(branch)
        for name in ("model.safetensors", *BESIDE):
            assert files[name] == (tmp_path / "run" / folder / name).read_bytes()
        assert result.commits[branch].endswith(repo.branches[branch])
        assert not any("state" in name or "optimizer" in name for name in files)
        bundle = ModelBundle.load(f"hf-hub:{REPO}@{branch}")
        assert bundle.provenance.run.step == step
        disk = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.equal(tensor, disk[name]) for name, tensor in bundle.state_dict.items())


def without_data(recipe):
    """A run that would be refused, if the Hub were not asked first."""
    return replace(recipe, data=replace(recipe.data, train="nothing"))


def tagged(repo):
    repo.tags["best"] = repo.branches["main"]


@pytest.mark.parametrize(
    ("token", "there", "private", "task", "sentence"),
    [
        ("hf_wrong", None, False, "supervised", "access token for lab/trained is missing or invalid"),
        ("hf_reader", None, False, "supervised", "access token may only read: use one with write permission"),
        ("hf_good", lambda repo: None, True, "supervised", "lab/trained is public already"),
        ("hf_good", tagged, False, "supervised", "best is a tag of lab/trained, which accepts no commits"),
        ("hf_good", lambda repo: None, True, "contrastive", "lab/trained-open_clip is public already"),
    ],
)
def test_what_the_hub_will_refuse_is_found_before_any_training(
    token, there, private, task, sentence, hub, tmp_path, monkeypatch
):
    if there is not None:
        repo_id = REPO if task == "supervised" else f"{REPO}-open_clip"
        HfApi().create_repo(repo_id, private=False)
        there(hub.repos[repo_id])
    before = len(writes(hub))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubRefusedError, match=sentence) as error:
        train(without_data(TINY[task]), tmp_path / "run", push=REPO, private=private)
    assert "\n" not in str(error.value)
    assert len(writes(hub)) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("act", [500, DROP, HTML])
def test_a_hub_that_cannot_be_asked_stops_no_run(recorded, act, hub, waited, tmp_path, caplog):
    body = {"act": 200, "body": act} if act is HTML else {"act": act}
    hub.fault = Fault(method="GET", path="/api/", **body).on(hub)
    result = train(replace(RUN, epochs=1), tmp_path / "run", push=REPO, instruments=recorded)
    assert result.commits.keys() == {"main", "best"}
    (warning,) = [text for text in caplog.messages if "whether" in text]
    assert warning.startswith(f"cannot find out whether {REPO} takes the models, the run goes on: ")


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, caplog):
    answer = threading.Event()
    hub.fault = lambda request: answer.wait(60) and None
    Publisher(REPO).ask(seconds=0.1)
    answer.set()
    assert caplog.messages == [
        f"cannot find out whether {REPO} takes the models, the run goes on: there was no answer within 0.1 seconds: "
        "check the network."
    ]


def under(license, folder):
    """A bundle with such a license, as a start or a teacher."""
    bundle = ModelBundle.load("vit_nano_reg4.digits")
    return str(replace(bundle, provenance=replace(bundle.provenance, license=license)).save(folder))


def distilled(teacher, tmp_path, *, start=None, license=None):
    """A run with a teacher, and a start, under these licenses; "none" tells none, and None is no start."""
    named = {"none": None}
    model = replace(RUN.model, arch="vit_nano_reg4")
    if start is not None:
        model = replace(model, start=under(named.get(start, start), tmp_path / "s"))
    task = Distill(teacher=under(named.get(teacher, teacher), tmp_path / "t"))
    return replace(RUN, model=model, task=task, license=license, epochs=1)


@pytest.mark.parametrize(
    ("teacher", "start", "license", "sentence"),
    [
        ("cc-by-nc-4.0", None, None, "task.teacher .* is cc-by-nc-4.0, which does not allow every use"),
        ("cc-by-nc-4.0", None, "mit", "has the license mit, but task.teacher .* is under cc-by-nc-4.0"),
        ("none", None, None, "no license is stated for task.teacher"),
        ("none", "mit", None, "no license is stated for model.start .* and task.teacher"),
        ("apache-2.0", "mit", None, "names several licenses, apache-2.0, mit: say with --license which one holds"),
        ("cc-by-nc-4.0", "mit", None, "is cc-by-nc-4.0, which does not allow every use"),
        ("cc-by-nc-4.0", "mit", "mit", "is cc-by-nc-4.0, not mit"),
    ],
)
def test_license_of_a_teacher_counts_like_that_of_a_start(recorded, teacher, start, license, sentence, tmp_path):
    recipe = distilled(teacher, tmp_path, start=start, license=license)
    with pytest.raises(LicenseError, match=sentence) as error:
        train(recipe, tmp_path / "run", push=REPO, instruments=recorded)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("teacher", "start", "license", "told"),
    [
        ("cc-by-nc-4.0", None, None, "cc-by-nc-4.0"),
        ("none", "cc-by-nc-4.0", None, "cc-by-nc-4.0"),
        ("none", "apache-2.0", None, None),
        ("mit", "apache-2.0", "mit", "mit"),
    ],
)
def test_license_of_a_run_with_a_teacher(teacher, start, license, told, falling, tmp_path):
    recipe = distilled(teacher, tmp_path, start=start, license=license)
    train(recipe, tmp_path / "run", instruments=falling)
    provenance = ModelBundle.load(tmp_path / "run" / "model").provenance
    assert provenance.license == told
    digest = hashlib.sha256((tmp_path / "t" / "model.safetensors").read_bytes()).hexdigest()
    taught = {"name": "t", "license": None if teacher == "none" else teacher, "sha256": digest}
    assert asdict(provenance.run.sources["task.teacher"]) == taught
    assert provenance.run.sources.keys() == {"task.teacher", *(["model.start"] * (start is not None))}
    origin = ModelBundle.load(tmp_path / "t").provenance.origin
    begun = "trained from scratch" if start is None else f"trained on from s ({origin})"
    assert provenance.origin.startswith(f"{begun}, distilled from t ({origin}), on digits with ")


def short(recipe):
    return replace(recipe, model=replace(recipe.model, drop_path=0.0), batch_size=8, epochs=1, epoch_steps=1)


def test_a_recipes_own_license_holds_for_its_own_images_only(recorded, tmp_path):
    recipe = short(RECIPES["supervised_digits"]())
    train(recipe, tmp_path / "own", push=REPO, instruments=recorded)
    assert ModelBundle.load(tmp_path / "own" / "model").provenance.license == "apache-2.0"
    images = write_folder(tmp_path / "mine", 12)
    private = replace(recipe, data=DataSettings(train=str(images)))
    with pytest.raises(LicenseError, match="no license is stated for the weights of recipe supervised_digits"):
        train(private, tmp_path / "run", push=REPO, instruments=recorded)
    assert not (tmp_path / "run").exists()
    train(private, tmp_path / "run", instruments=recorded)
    assert ModelBundle.load(tmp_path / "run" / "model").provenance.license is None
    train(replace(private, license="mit"), tmp_path / "said", push=REPO, instruments=recorded)
    assert ModelBundle.load(tmp_path / "said" / "model").provenance.license == "mit"


def test_the_bundle_tells_on_how_many_images_it_was_measured(tmp_path):
    recipe = replace(RUN, epochs=1, watch=replace(RUN.watch, eval_images=2048, eval_every=0, save_every=1))
    train(recipe, tmp_path / "run")
    told = ModelBundle.load(tmp_path / "run" / "model").provenance
    assert told.run.evaluated == len(digits("test"))
    not_measured = ModelBundle.load(checkpoints(tmp_path / "run")[0]).provenance
    assert not not_measured.metrics
    assert not_measured.run.evaluated is None
