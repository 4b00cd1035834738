"""Whatever is damaged in a run's folder is named in a sentence, or does not change how the run ends."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from training_runs import TINY, train

from vitreg_hub.errors import BundleError, RecipeError, TrainingError, VitregError
from vitreg_hub.training import loop
from vitreg_hub.training.run import lock
from vitreg_hub.training.run.assembly import make_accelerator
from vitreg_hub.training.run.checkpoints import restore_run
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.run.lock import locked
from vitreg_hub.training.run.trainer import Trainer

SMALL = replace(TINY["supervised"].watch, save_every=1, eval_every=1, keep=2, artifact_images=0, eval_images=8)
RECIPE = replace(TINY["supervised"], watch=SMALL, epochs=1.5)  # three steps
STATE = "checkpoints/step_0000002/state"
FILES = (
    *("recipe.yaml", "metrics.jsonl", "curves.png", "first_batch.png"),
    *("best/config.json", "best/model.safetensors", "best/README.md", "checkpoints/step_0000002/config.json"),
    *(f"{STATE}/{name}" for name in ("state.json", "backbone.safetensors", "ema.safetensors", "optimizer.safetensors")),
)
FOLDERS = ("best", "checkpoints", "checkpoints/step_0000001", "checkpoints/step_0000002", STATE)


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was killed after two of its three steps."""
    run = tmp_path_factory.mktemp("whole") / "run"
    do_step = Trainer.do_step

    def killed(self, step, *args):
        if step == 2:
            raise Killed
        return do_step(self, step, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "do_step", killed)
        with pytest.raises(Killed):
            train(RECIPE, run)
    for name in ("curves.png", "first_batch.png"):
        (run / name).write_bytes(b"a picture")
    return run


@pytest.fixture(scope="module")
def end(whole, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of that run's end."""
    run = shutil.copytree(whole, tmp_path_factory.mktemp("end") / "run")
    train(RECIPE, run)
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def one_sentence(error: VitregError) -> str:
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    return str(error)


def goes_right(run: Path, end: dict[str, torch.Tensor]) -> str | None:
    """Go on with a run: why it is refused, or None if it ends as it should."""
    try:
        train(RECIPE, run)
    except VitregError as error:
        return one_sentence(error)
    made = load_file(run / "model" / "model.safetensors")
    assert [name for name in end if not torch.equal(end[name], made[name])] == []
    assert load_file(run / "best" / "model.safetensors").keys() == end.keys()
    return None


def as_folder(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte differs": lambda file: file.write_bytes(file.read_bytes()[:-5] + b"7" + file.read_bytes()[-4:]),
    "of another type": lambda file: file.write_text('["another", 1]\n'),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00\x80" * 9),
    "nested without end": lambda file: file.write_text("[" * 5000),
    "a folder": as_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file(file, damage, run, end):
    DAMAGES[damage](run / file)
    why = goes_right(run, end)
    if file.startswith(STATE):
        assert why
        assert "step_0000002 is no checkpoint that a run can go on from" in why
        assert "delete it" in why
        if file.endswith("safetensors") and damage not in ("missing", "a folder"):
            assert f"{Path(file).name} is not as it was written" in why
        shutil.rmtree(run / "checkpoints" / "step_0000002")
        assert goes_right(run, end) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_file_in_the_place_of_a_folder(folder, run, end):
    shutil.rmtree(run / folder)
    (run / folder).write_text("x")
    assert goes_right(run, end)


@pytest.mark.parametrize("name", ["ema", "backbone", "heads"])
def test_another_file_in_the_place_of_the_optimizer(name, run, end):
    state = run / STATE
    (state / "heads.safetensors").exists() or shutil.copyfile(state / "ema.safetensors", state / "heads.safetensors")
    shutil.copyfile(state / f"{name}.safetensors", state / "optimizer.safetensors")
    assert "optimizer.safetensors is not as it was written" in (goes_right(run, end) or "")


def test_the_lines_up_to_a_checkpoint_are_on_the_disk_before_it(run, end, monkeypatch):
    seen = []
    monkeypatch.setattr("vitreg_hub.training.run.checkpoints.synced", seen.append)
    assert goes_right(run, end) is None
    assert run / "metrics.jsonl" in seen


def test_a_state_that_was_changed(run, end):
    file = run / STATE / "state.json"
    state = json.loads(file.read_text())
    state["extra"]["seconds"] += 1
    file.write_text(json.dumps(state))
    assert "state.json is not as it was written" in (goes_right(run, end) or "")


def test_the_state_of_another_step(run, end):
    earlier, later = checkpoints(run)
    shutil.rmtree(later)
    shutil.copytree(earlier, later)
    assert "its state is that of step 1" in (goes_right(run, end) or "")
    later.rename(later.with_name("step_0000009"))
    assert "its state is that of step 1" in (goes_right(run, end) or "")


@pytest.fixture(scope="module")
def trainer():
    return Trainer(RECIPE, make_accelerator(RECIPE))


def older(checkpoint: Path) -> dict:
    """The state as it was written before there were checksums."""
    state = json.loads((checkpoint / "state" / "state.json").read_text())
    assert state.pop("sha256")
    assert set(state.pop("files")) >= {"backbone.safetensors", "ema.safetensors", "optimizer.safetensors"}
    return state


def places(state, before=()):
    """The keys of every value."""
    if before:
        yield before
    for key in state if isinstance(state, dict) else range(len(state)) if isinstance(state, list) else ():
        yield from places(state[key], (*before, key))


def test_older_checkpoints_are_read(run, trainer, end):
    file = run / STATE / "state.json"
    file.write_text(json.dumps(older(file.parents[1])))
    assert goes_right(run, end) is None


@pytest.mark.parametrize("wrong", [None, "x", -1, [], {}, [1], {"x": 1}, 1e300, "missing"], ids=str)
def test_an_older_state_with_a_wrong_value_anywhere(wrong, run, trainer):
    """No checksum guards it, so every value is checked."""
    checkpoint = checkpoints(run)[-1]
    state, refused = older(checkpoint), 0
    for *way, last in places(state):
        changed = json.loads(json.dumps(state))
        inside = changed
        for key in way:
            inside = inside[key]
        if wrong == "missing":
            del inside[last]
        else:
            inside[last] = wrong
        (checkpoint / "state" / "state.json").write_text(json.dumps(changed))
        try:
            restore_run(trainer, checkpoint)
        except VitregError as error:
            refused += bool(one_sentence(error))
    assert refused > 8


def test_a_step_beyond_the_end_and_an_optimizer_of_other_weights(run, trainer):
    checkpoint = checkpoints(run)[-1]
    state = older(checkpoint)
    far = checkpoint.rename(checkpoint.with_name("step_0000007"))
    (far / "state" / "state.json").write_text(json.dumps({**state, "step": 7}))
    with pytest.raises(TrainingError, match="its run has only 3 steps"):
        restore_run(trainer, far)
    checkpoint = far.rename(checkpoint)
    (checkpoint / "state" / "state.json").write_text(json.dumps(state))
    shutil.copyfile(checkpoint / "state" / "ema.safetensors", checkpoint / "state" / "optimizer.safetensors")
    with pytest.raises(TrainingError, match="an optimizer of other weights"):
        restore_run(trainer, checkpoint)


def test_an_older_checkpoint_without_its_optimizer(run, end):
    file = run / STATE / "state.json"
    file.write_text(json.dumps(older(file.parents[1])))
    file.with_name("optimizer.safetensors").unlink()
    assert "the file of the optimizer's state is missing" in (goes_right(run, end) or "")


# Two runs, and what a killed one leaves


def test_a_second_run_is_refused(run, end):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with locked(run, main=True):
        with pytest.raises(RecipeError, match=f"another run is using {run}: wait for its end, or give another"):
            train(RECIPE, run)
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    assert goes_right(run, end) is None


@pytest.mark.parametrize("is_new", [False, True])
def test_a_lock_that_its_run_deletes_while_another_waits(is_new, tmp_path, monkeypatch):
    """The run that had it ended, and a third may have begun, between opening and locking the file."""

    class Late(FileLock):
        def __enter__(self):
            entered = super().__enter__()
            Path(self.lock_file).unlink()
            if is_new:
                Path(self.lock_file).touch()
            return entered

    monkeypatch.setattr(lock, "FileLock", Late)
    with pytest.raises(RecipeError, match="another run is using"), lock.locked(tmp_path / "run", main=True):
        pass


def test_the_lock_of_a_killed_process_is_gone_while_its_children_live(tmp_path):
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        with locked(tmp_path / "run", main=True):
            worker = os.fork()
            if worker:
                os.write(write, str(worker).encode())
            os.read(ready if worker else os.pipe()[0], 0)
            import time

            time.sleep(60)
    worker = int(os.read(ready, 20))
    with pytest.raises(RecipeError, match="another run"), locked(tmp_path / "run", main=True):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)
    try:
        with locked(tmp_path / "run", main=True):
            assert (tmp_path / "run" / ".lock").exists()
    finally:
        os.kill(worker, 9)
    assert not list((tmp_path / "run").iterdir())


def test_what_killed_processes_left_is_deleted_and_nothing_else(run, end):
    ours = [f".{name}-a_0z9k1x" for name in ("curves.png", "recipe.yaml", "metrics.jsonl", "first_batch.png", "best")]
    ours += [".model-swap", ".model-open_clip-a_0z9k1x", "checkpoints/.step_0000002-a_0z9k1x"]
    ours += ["checkpoints/.step_0000000-old"]
    others = [".git", ".model-notes", ".best-of-all-a_0z9k1x", "checkpoints/.notes-a_0z9k1x", ".curves.png-1"]
    for name in (*ours, *others):
        (run / name).mkdir()
        (run / name / "file").touch()
    (run / ".model-abcdefgh").touch()
    assert goes_right(run, end) is None
    assert not [name for name in ours if (run / name).exists()]
    assert all((run / name).exists() for name in (*others, ".model-abcdefgh"))
    assert not (run / ".lock").exists()


def test_a_folder_with_nothing_but_leftovers_is_new(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / ".recipe.yaml-a_0z9k1x").mkdir(parents=True)
    (run / ".recipe.yaml-a_0z9k1x" / "recipe.yaml").write_text("name: half")
    (run / ".lock").touch()
    monkeypatch.setattr(loop, "write_recipe", lambda *_: pytest.fail("begun"))
    with pytest.raises(pytest.fail.Exception, match="begun"):
        train(RECIPE, run, resume="never")
    assert not list(run.iterdir())
    (run / "file").touch()
    with pytest.raises(BundleError, match="holds no run"):
        train(RECIPE, run)


@pytest.mark.parametrize("name", ["x" * 300, "caf\udce9", "a\0b", "file/run"])
def test_names_that_no_folder_can_have(name, tmp_path):
    (tmp_path / "file").touch()
    for asked in ({"out": tmp_path / name}, {"out": tmp_path / "new", "resume": str(tmp_path / name)}):
        with pytest.raises(VitregError) as caught:
            train(RECIPE, **asked)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """Tests may run as root, who can read everything."""
    (tmp_path / "run").mkdir()

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(BundleError, match=r"run cannot be used \(Permission denied\)"):
        train(RECIPE, tmp_path / "run")
    loop_of_links = tmp_path / "links"
    loop_of_links.symlink_to(loop_of_links)
    with pytest.raises(BundleError, match="cannot write to"):
        train(RECIPE, loop_of_links)
