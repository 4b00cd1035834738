"""A run that was stopped anywhere ends as one that was not, bit for bit."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from training_runs import LAMB, STEPS, TINY, lines, train

from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, RecipeError, TrainingError
from vitreg_hub.files import new_folder
from vitreg_hub.images.embedded import digits
from vitreg_hub.training import loop
from vitreg_hub.training.data import opening as data
from vitreg_hub.training.recipes.files import recipe_to_yaml
from vitreg_hub.training.run import checkpoints as run_state
from vitreg_hub.training.run import state
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.run.model_folder import ModelWriter
from vitreg_hub.training.run.trainer import Trainer
from vitreg_hub.training.tasks.supervised.task import SupervisedTask

RUNS = {
    **TINY,
    "lamb": LAMB,
    "nadamuon": replace(LAMB, optim=replace(LAMB.optim, opt="nadamuon")),
    "stream": replace(TINY["supervised"], data=replace(TINY["supervised"].data, streaming=True, shuffle_block=12)),
}


def saving(name: str, **changes):
    recipe = RUNS[name]
    watch = replace(recipe.watch, save_every=1, eval_every=2, keep=2)
    return replace(recipe, watch=watch, model=replace(recipe.model, drop_path=0.2), **changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    made = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("run") / name
            train(saving(name), made[name])
        return made[name]

    return run


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint, the model, the best model and their text towers hold."""
    files = [*checkpoints(run)[-1].rglob("*.safetensors"), *run.glob("[mb]*/*.safetensors")]
    return {f"{file.parent.name}/{file.name}/{key}": x for file in files for key, x in load_file(file).items()}


def configs(run: Path) -> list[dict]:
    """What the bundles tell of themselves, without what depends on the clock and on who started the run, and when."""
    found = []
    for folder in (checkpoints(run)[-1], run / "model", *[run / "best"] * (run / "best").exists()):
        found.append(json.loads((folder / "config.json").read_text()))
        for name in ("created", "seconds", "command"):
            found[-1]["vitreg"]["provenance"].pop(name, None)
    return found


def told(run: Path) -> list[dict]:
    """What is written of every step, without what depends on the clock and the machine."""
    clock = {"time", "images_per_second", "data_wait", "eta_seconds", "memory_gib"}
    return [{key: value for key, value in line.items() if key not in clock} for line in lines(run)]


def assert_same(run: Path, other: Path) -> None:
    one, two = tensors(run), tensors(other)
    assert one.keys() == two.keys()
    assert any(key.startswith("state/optimizer.safetensors/") for key in one)
    assert any(key.startswith("best/") for key in one)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert configs(run) == configs(other)
    assert told(run) == told(other)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name in TINY for step in (1, 3)] + [("lamb", 2), ("nadamuon", 2), ("stream", 2)]
)
def test_killed_in_a_step(name, step, uninterrupted, tmp_path, monkeypatch):
    do_step = Trainer.do_step

    def killed(self, number, *args):
        if number == step:
            raise Killed
        torch.rand(7)  # what else happens in a process
        return do_step(self, number, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "do_step", killed)
        with pytest.raises(Killed):
            train(saving(name), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == f"step_{step:07d}"
    assert not (tmp_path / "run" / "model").exists()
    train(saving(name), tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(name))


@pytest.mark.parametrize("moment", ["before the first checkpoint", "while writing one", "before the model"])
def test_killed_elsewhere(moment, uninterrupted, tmp_path, monkeypatch):
    name = "supervised"
    with monkeypatch.context() as patched:
        if moment == "before the first checkpoint":
            patched.setattr(loop, "save_run", raiser)
        elif moment == "before the model":
            patched.setattr(ModelWriter, "write", killed_before_the_model)
        else:
            count = iter(range(100))

            def killed(*args, **kwargs):
                if next(count) == 9:  # in the second checkpoint
                    raise Killed
                safetensors.torch.save_file(*args, **kwargs)

            patched.setattr(state, "save_file", killed)
            patched.setattr(run_state, "new_folder", left_behind)
        with pytest.raises(Killed):
            train(saving(name), tmp_path / "run")
    if moment == "while writing one":
        assert [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    train(saving(name), tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted(name))
    assert len(checkpoints(tmp_path / "run")) == 2
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


def raiser(*args, **kwargs):
    raise Killed


write = ModelWriter.write


def killed_before_the_model(self, folder, *args, **options):
    if folder.name == "model":
        raise Killed
    write(self, folder, *args, **options)


@contextmanager
def left_behind(target: Path):
    """As `new_folder` in a process that is killed: nothing is tidied up."""
    staging = target.with_name(f".{target.name}-left0000")
    staging.mkdir(parents=True)
    yield staging
    staging.rename(target)


STOPS = {"SIGTERM": 0, "SIGINT": 130}
"""Exit status after each signal."""


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_saves(name, uninterrupted, tmp_path):
    recipe = saving("supervised")
    recipe = replace(recipe, watch=replace(recipe.watch, save_every=0))
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time, torch\nfrom pathlib import Path\n"
        "from vitreg_hub.console import console\n"
        "from vitreg_hub.training.loop import train\nfrom vitreg_hub.training.run.trainer import Trainer\n"
        "from vitreg_hub.training.recipes.files import recipe_from_yaml\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "step = Trainer.do_step\n"
        "def slow(self, number, *args):\n"
        "    if number == 2: Path(sys.argv[2]).touch(); time.sleep(3)\n"
        "    return step(self, number, *args)\n"
        "Trainer.do_step = slow\n"
        "with console(): result = train(recipe_from_yaml(Path(sys.argv[1]).read_text()), sys.argv[3])\n"
        "assert result.model is None and result.step == 3, result\n"
    )
    command = [sys.executable, script, tmp_path / "recipe.yaml", tmp_path / "there", tmp_path / "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (tmp_path / "there").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.Signals[name])
    assert process.wait(60) == STOPS[name], process.stderr.read()
    shown = process.stderr.read()
    assert "Traceback" not in shown
    if name == "SIGINT":
        assert "Ctrl-C again stops at once" in shown
        assert "stopped after step 3 of 4: the same command goes on" in shown
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000003"]
    train(saving("supervised"), tmp_path / "run")
    assert tensors(tmp_path / "run").keys() == tensors(uninterrupted("supervised")).keys()
    assert_same(tmp_path / "run", uninterrupted("supervised"))


def test_a_second_interruption_stops_at_once(tmp_path, monkeypatch):
    def interrupted(self, step, *args):
        for _ in range(2 if step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return do_step(self, step, *args)

    do_step, before = Trainer.do_step, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Trainer, "do_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(saving("supervised"), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) == before
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000001"]


def test_a_finished_run_goes_on_for_more_epochs(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub")
    recipe, run = saving("supervised"), tmp_path / "run"
    train(recipe, run)
    more = replace(recipe, epochs=recipe.epochs * 1.5)
    result = train(more, run)
    assert (result.step, result.total_steps) == (6, 6)
    assert f"going on after step 4 of 6, from {run / 'checkpoints' / 'step_0000004'}" in caplog.messages
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, 7))
    told = ModelBundle.load(run / "model").provenance.run
    assert (told.step, told.total_steps, told.recipe["epochs"]) == (6, 6, more.epochs)
    assert train(more, run).step == 6  # is finished
    with pytest.raises(RecipeError, match=r"has epochs 3\.0, not 2\.0"):
        train(recipe, run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(TrainingError, match="has no checkpoint from which it could go on"):
        train(replace(more, epochs=9.0), run)


def test_weights_can_be_read_one_by_one(uninterrupted):
    state = checkpoints(uninterrupted("dinov2"))[-1] / "state"
    assert {file.name for file in state.iterdir()} == {
        *("backbone.safetensors", "heads.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json")
    }
    backbone, teacher = load_file(state / "backbone.safetensors"), load_file(state / "teacher.safetensors")
    model = ModelBundle.load(uninterrupted("dinov2") / "model").build()
    assert set(backbone) == {*model.state_dict(), "mask_token"}
    for key, tensor in model.state_dict().items():
        assert torch.equal(teacher[f"backbone.{key}"], tensor)
    assert not torch.equal(backbone["cls_token"], teacher["backbone.cls_token"])
    assert {"ema.safetensors", "backbone.safetensors"} <= {
        file.name for file in (checkpoints(uninterrupted("supervised"))[-1] / "state").iterdir()
    }


@pytest.mark.usefixtures("warm")
def test_checkpoints_are_bundles(uninterrupted):
    before, folder = checkpoints(uninterrupted("supervised"))
    assert set(verify(folder).values()) == {0.0}
    assert "accuracy" in ModelBundle.load(folder).provenance.metrics
    assert not ModelBundle.load(before).provenance.metrics  # of other weights


def test_a_finished_run_is_left_alone(uninterrupted):
    run = uninterrupted("distill")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = train(saving("distill"), run)
    assert (result.step, result.model) == (STEPS, run / "model")
    assert result.metrics["eval/patch_cosine"] == lines(run)[-1]["eval/patch_cosine"]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_another_recipe_is_refused(uninterrupted, tmp_path):
    run = uninterrupted("distill")
    other = saving("distill")
    other = replace(other, optim=replace(other.optim, lr=5e-4))
    with pytest.raises(RecipeError, match=r"has optim.lr 0.001, not 0.0005"):
        train(other, run)
    with pytest.raises(BundleError, match="is not to be resumed"):
        train(saving("distill"), run, resume="never")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="holds no run"):
        train(saving("distill"), tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint"):
        train(saving("distill"), tmp_path / "new", resume=str(tmp_path))
    assert not (tmp_path / "new").exists()


def test_from_a_named_checkpoint(uninterrupted, tmp_path):
    run = uninterrupted("distill")
    train(saving("distill"), tmp_path / "new", resume=str(checkpoints(run)[0]))
    one, two = tensors(tmp_path / "new"), tensors(run)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_a_named_checkpoint_overwrites_no_other_run(uninterrupted):
    run, other = uninterrupted("distill"), uninterrupted("supervised")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    with pytest.raises(RecipeError, match=r"has task\.kind Supervised, not Distill"):
        train(saving("distill"), other, resume=str(checkpoints(run)[0]))
    assert before == {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    with pytest.raises(BundleError, match="is further than step_0000003: go on from there in another folder"):
        train(saving("distill"), run, resume=str(checkpoints(run)[0]))


def test_data_that_grew_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(ModelWriter, "write", killed_before_the_model)
        with pytest.raises(Killed):
            train(saving("distill"), tmp_path / "run")
    fewer = digits("train").select(range(1000))
    monkeypatch.setattr(data, "TRAINING_SETS", {"digits": lambda split: fewer if split == "train" else digits(split)})
    with pytest.raises(TrainingError, match="is of a run with 1438 images and 4 steps, but this one has 1000 images"):
        train(saving("distill"), tmp_path / "run")


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, monkeypatch):
    """A loss can be finite while a gradient is not."""
    after_step = SupervisedTask.after_step

    def poisoned(self, step):
        after_step(self, step)
        if step == 2:
            self.network.backbone.reg_token.data[0, 0, 0] = float("inf")

    monkeypatch.setattr(SupervisedTask, "after_step", poisoned)
    with pytest.raises(TrainingError, match="reg_token of backbone is not finite after 3 steps"):
        train(saving("supervised"), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000001", "step_0000002"]


def test_damaged_checkpoint_is_named(uninterrupted, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelWriter, "write", killed_before_the_model)
        with pytest.raises(Killed):
            train(saving("distill"), tmp_path / "run")
    file = checkpoints(tmp_path / "run")[-1] / "state" / "backbone.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(TrainingError, match=f"step_{STEPS:07d} is no checkpoint that a run can go on from"):
        train(saving("distill"), tmp_path / "run")


def test_loss_that_is_no_number_keeps_the_last_good_state(tmp_path, monkeypatch):
    recipe = saving("supervised")
    do_step = Trainer.do_step

    def poisoned(self, step, batches, *args):
        if step == 2:
            batches[0].crops[0][1, 0, 3, 3] = float("nan")
        return do_step(self, step, batches, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "do_step", poisoned)
        with pytest.raises(
            TrainingError, match=r"loss is nan in step 3, whose batch begins with row \d+.*step_0000002"
        ):
            train(recipe, tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000001", "step_0000002"]
    weights = load_file(checkpoints(tmp_path / "run")[-1] / "state" / "backbone.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert train(recipe, tmp_path / "run").step == STEPS


def test_full_disk_keeps_the_last_good_state(tmp_path, monkeypatch):
    @contextmanager
    def full(target: Path):
        with new_folder(target) as staging:
            yield staging
            if target.name == "step_0000003":
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_state, "new_folder", full)
    with pytest.raises(BundleError, match="step_0000003: No space left on device"):
        train(saving("supervised"), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000001", "step_0000002"]
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
