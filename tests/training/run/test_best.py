"""The best model of a run: which one it is, wherever the run was killed, and what lies beside it."""

import json
import logging
import math
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_runs import NO_PICTURES, STEPS, TINY, lines

from vitreg_hub import environment
from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel
from vitreg_hub.errors import BundleError
from vitreg_hub.files import replaced_folder
from vitreg_hub.training import loop
from vitreg_hub.training.loop import Instruments, train
from vitreg_hub.training.recipes.files import recipe_from_yaml, recipe_to_yaml
from vitreg_hub.training.recipes.settings import WatchSettings
from vitreg_hub.training.run import folders, trainer
from vitreg_hub.training.run.folders import checkpoints, clear_leftovers
from vitreg_hub.training.run.measured import Best, better, read_best
from vitreg_hub.training.run.model_folder import ModelWriter
from vitreg_hub.training.run.publisher import Publisher
from vitreg_hub.training.run.trainer import Trainer

pytestmark = pytest.mark.usefixtures("warm")

SCRIPT = {0: 0.9, 1: 0.3, 2: 0.5, 3: 0.4, 4: 0.5}
"""Accuracy by step: the first of two equal ones counts, and that of no step does not."""
RECIPE = replace(
    TINY["supervised"],
    watch=WatchSettings(log_every=1, eval_every=1, save_every=2, keep=9, artifact_images=0),
    license="mit",
)


class Killed(BaseException):
    """What no code of ours catches."""


def killed(*args, **kwargs):
    raise Killed


class Script(dict):
    """Evaluations find the accuracies by step that are written here; the real ones would find anything."""

    def __init__(self):
        super().__init__(SCRIPT)

    def measure(self, trainer):
        return {"eval/accuracy": self[trainer.step], "eval/knn_accuracy": 0.5}

    @property
    def train(self):
        """`train` by this script, without pictures, which take most of the time."""
        return partial(train, instruments=replace(NO_PICTURES, measure=self.measure))

    @property
    def train_with_pictures(self):
        return partial(train, instruments=Instruments(measure=self.measure))


@pytest.fixture
def script():
    return Script()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(folder: Path, other: Path) -> bool:
    one, two = weights(folder), weights(other)
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def marked(run: Path) -> list[int]:
    """Steps that metrics.jsonl says were the best so far."""
    return [line["step"] for line in lines(run) if line.get("best")]


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*")]


@pytest.mark.parametrize(
    ("before", "step", "score", "after"),
    [
        (None, 1, 0.2, 1),
        (None, 0, 0.2, None),
        (None, 3, math.nan, None),
        (0.2, 3, 0.3, 3),
        (0.2, 3, 0.2, 2),
        (0.2, 3, 0.1, 2),
        (0.2, 3, math.nan, 2),
        (-1.0, 3, -0.5, 3),
    ],
)
def test_better_is_strictly_more(before, step, score, after):
    best = None if before is None else Best(name="accuracy", score=before, step=2)
    found = better(best, RECIPE, step=step, metrics={"eval/accuracy": score})
    assert (found and found.step) == after
    assert found is None or found.score == (score if after == step else before)


@pytest.mark.parametrize(
    ("task", "score"),
    [
        ("supervised", "accuracy"),
        ("dinov2", "knn_accuracy"),
        ("contrastive", "zero_shot_accuracy"),
        ("distill", "patch_cosine"),
    ],
)
def test_every_task_has_a_score_that_is_measured(task, score, tmp_path):
    result = train(TINY[task], tmp_path / "run", instruments=NO_PICTURES)
    last = lines(tmp_path / "run")[-1]
    assert result.best == Best(name=score, score=last[f"eval/{score}"], step=STEPS)
    assert last["best"] is True
    assert better(None, TINY[task], step=3, metrics={"eval/other": 0.5}) is None


def test_best_is_what_was_measured_best(script, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub")
    run = tmp_path / "run"
    result = script.train_with_pictures(RECIPE, run)
    assert result.best == Best(name="accuracy", score=0.5, step=2)
    assert result == script.train_with_pictures(RECIPE, run)  # a finished run tells the same
    assert same(run / "best", checkpoints(run)[0])  # of step 2
    assert not same(run / "best", run / "model")
    assert marked(run) == [1, 2]
    told = f"eval/knn_accuracy 0.5  (the best so far, below the start: {SCRIPT[0]})"
    assert [message for message in caplog.messages if "best so far" in message] == [
        f"evaluation after {step} steps:  eval/accuracy {SCRIPT[step]}  {told}" for step in (1, 2)
    ]
    assert result.metrics["start/accuracy"] == SCRIPT[0]
    told = ModelBundle.load(run / "best").provenance
    assert told.metrics == {"accuracy": 0.5, "knn_accuracy": 0.5}
    assert (told.run.step, told.run.total_steps) == (2, STEPS)
    assert told.best == BestModel(score="accuracy", step=2)
    for folder in (run / "model", *checkpoints(run)):
        assert ModelBundle.load(folder).provenance.best is None
    assert not any(verify(run / "best").values())
    assert not hidden(run)


def test_recipe_metrics_and_curves_lie_beside_what_is_published(script, tmp_path):
    run = tmp_path / "run"
    script.train_with_pictures(RECIPE, run)
    for folder, step in (("best", 2), ("model", STEPS)):
        files = {path.name for path in (run / folder).iterdir()}
        assert files == {
            *("config.json", "model.safetensors", "README.md", "recipe.yaml", "metrics.jsonl", "curves.png")
        }
        assert recipe_from_yaml((run / folder / "recipe.yaml").read_text()) == RECIPE
        assert lines(run / folder) == [line for line in lines(run) if line["step"] <= step]
        assert (run / folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "curves.png").read_bytes() == (run / "model" / "curves.png").read_bytes()
    assert (run / "best" / "curves.png").read_bytes() != (run / "model" / "curves.png").read_bytes()
    inside = {path.name for path in checkpoints(run)[0].iterdir()}
    assert inside == {"config.json", "model.safetensors", "README.md", "state"}  # nobody publishes those


def test_what_is_above_the_start_is_not_called_below_it(script, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub")
    script[0] = script[4] = 0.5
    script.train(RECIPE, tmp_path / "run")
    told = [message.partition("(")[2] for message in caplog.messages if "best so far" in message]
    assert told == ["the best so far, below the start: 0.5)", "the best so far)"]


def test_a_run_that_gets_no_better_ends_early(script, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "vitreg_hub")
    recipe = replace(RECIPE, watch=replace(RECIPE.watch, patience=2, save_every=0), epochs=3)
    script |= {2: 0.2, 3: 0.3}
    with monkeypatch.context() as patched:
        patched.setattr(ModelWriter, "write", before_the_model())
        with pytest.raises(Killed):
            script.train(recipe, tmp_path / "run")
    result = script.train(recipe, tmp_path / "run")  # one that was killed before it wrote its model ends as early
    assert (result.step, result.best.step, result.model) == (3, 1, tmp_path / "run" / "model")
    assert "ended after step 3: 2 evaluations were not better (watch.patience)" in caplog.messages
    assert script.train(recipe, tmp_path / "run").model  # is finished
    told = ModelBundle.load(result.model).provenance.run
    assert (told.step, told.total_steps, told.start_score) == (3, 3, SCRIPT[0])
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_0000003"]
    script |= {5: 0.1, 6: 0.1}
    more = script.train(replace(recipe, watch=replace(recipe.watch, patience=3)), tmp_path / "run")
    assert (more.step, more.best.step) == (6, 4)


def test_without_a_score_there_is_no_best(tmp_path):
    instruments = replace(NO_PICTURES, measure=lambda trainer: {"artifacts/block_0/norm_q50": 1.0})
    result = train(RECIPE, tmp_path / "run", instruments=instruments)
    assert result.best is None
    assert not (tmp_path / "run" / "best").exists()
    assert marked(tmp_path / "run") == []


@pytest.fixture(scope="module")
def finished():
    """Folders of runs that were not killed, by what their last evaluation finds."""
    return {}


@pytest.fixture
def uninterrupted(finished, script, tmp_path_factory):
    """Make a run that is not killed, with the evaluations as they are now."""

    def run() -> Path:
        if script[STEPS] not in finished:
            finished[script[STEPS]] = tmp_path_factory.mktemp("finished") / "run"
            script.train(RECIPE, finished[script[STEPS]])
        return finished[script[STEPS]]

    return run


def after(number: int, function):
    """A function that is killed instead of called for that time."""
    calls = iter(range(1, 99))

    def call(*args, **kwargs):
        if next(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    return call


def before_step(number: int):
    do_step = Trainer.do_step

    def call(self, step, *args):
        if step == number:
            raise Killed
        return do_step(self, step, *args)

    return call


def before_the_model():
    write = ModelWriter.write

    def call(self, folder, *args, **options):
        if folder.name == "model":
            raise Killed
        write(self, folder, *args, **options)

    return call


MOMENTS = {
    "before the first best": lambda patched: patched.setattr(Trainer, "do_step", before_step(0)),
    "with a best that no checkpoint knows": lambda patched: patched.setattr(Trainer, "do_step", before_step(1)),
    "after a checkpoint of the best": lambda patched: patched.setattr(Trainer, "do_step", before_step(2)),
    "after a step that was not better": lambda patched: patched.setattr(Trainer, "do_step", before_step(3)),
    "before the second best is written": lambda patched: patched.setattr(
        ModelWriter, "write", after(2, ModelWriter.write)
    ),
    "while the second best is written": lambda patched: patched.setattr(
        ModelWriter, "fill", after(2, ModelWriter.fill)
    ),
    "before the new one has its place": lambda patched: patched.setattr(Path, "rename", renaming("new", 2)),
    "before the old one is away": lambda patched: patched.setattr(Path, "rename", renaming("best", 1)),
    "before the old one is deleted": lambda patched: patched.setattr(folders.shutil, "rmtree", deleting(2)),
    "between the second best and its checkpoint": lambda patched: patched.setattr(loop, "save_run", killed),
    "before the model": lambda patched: patched.setattr(ModelWriter, "write", before_the_model()),
}


def renaming(name: str, number: int):
    """Killed when a path of this name is renamed for that time."""
    rename, calls = Path.rename, iter(range(1, 99))

    def call(self, target):
        if self.name == name and next(calls) == number:
            raise Killed
        return rename(self, target)

    return call


def deleting(number: int):
    """Killed when the place where the best models are exchanged is deleted for that time."""
    rmtree, calls = folders.shutil.rmtree, iter(range(1, 99))

    def call(path, **options):
        if Path(path).name == ".best-swap" and next(calls) == number:
            raise Killed
        rmtree(path, **options)

    return call


@pytest.mark.parametrize(
    ("moment", "best"), [*((moment, 4) for moment in MOMENTS), ("after a step that was not better", 2)]
)
def test_best_of_a_killed_run_is_that_of_one_that_was_not(moment, best, script, uninterrupted, tmp_path):
    script[STEPS] = 0.8 if best == STEPS else 0.5
    whole, run = uninterrupted(), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        MOMENTS[moment](patched)
        with pytest.raises(Killed):
            script.train(RECIPE, run)
    complete = [path for path in (run / "best", run / ".best-swap" / "old") if path.exists()]
    for folder in complete:
        assert ModelBundle.load(folder).provenance.run.step in (1, 2, best)
    assert bool(complete) == (moment != "before the first best")
    result = script.train(RECIPE, run)
    assert result.best == read_best(whole, RECIPE) == Best(name="accuracy", score=script[best], step=best)
    assert same(run / "best", whole / "best")
    assert ModelBundle.load(run / "best").provenance.metrics == ModelBundle.load(whole / "best").provenance.metrics
    assert marked(run) == marked(whole) == [1, 2, *[4] * (best == 4)]
    assert not hidden(run)


@pytest.mark.parametrize(
    ("rerun", "best", "marks"),
    [
        ({3: 0.4, 4: 0.3}, (3, 0.7), [1]),  # nothing is as good as the checkpoint's best, whose weights are lost
        ({3: 0.6, 4: 0.3}, (3, 0.6), [1, 3]),
        ({3: 0.4, 4: 0.6}, (4, 0.6), [1, 4]),
        ({3: 0.65, 4: 0.65}, (3, 0.65), [1, 3]),
        ({3: 0.7, 4: 0.8}, (4, 0.8), [1, 3, 4]),
    ],
)
@pytest.mark.parametrize("kills", [1, 2])
def test_killed_run_that_finds_something_else_the_second_time(kills, rerun, best, marks, script, tmp_path):
    script |= {1: 0.6, 2: 0.5, 3: 0.7}
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "do_step", before_step(3))
        with pytest.raises(Killed):
            script.train(RECIPE, run)
    assert read_best(run, RECIPE) == Best(name="accuracy", score=0.7, step=3)
    script |= rerun
    recipe = replace(RECIPE, watch=replace(RECIPE.watch, save_every=1))
    if kills == 2:  # after the checkpoint of step 3
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Trainer, "do_step", before_step(3))
            with pytest.raises(Killed):
                script.train(recipe, run)
    result = script.train(recipe, run)
    assert result.best == read_best(run, RECIPE) == Best(name="accuracy", score=best[1], step=best[0])
    assert marked(run) == marks
    told = ModelBundle.load(run / "best").provenance
    assert (told.run.step, told.metrics["accuracy"]) == best
    if best[0] == STEPS:
        assert same(run / "best", run / "model")


def test_as_good_as_a_lost_best_is_not_taken_before_what_is_better(script, tmp_path):
    """Or the lines of a run that computes the same again would differ from those of one that was not killed."""
    script |= {1: 0.5, 2: 0.4, 3: 0.5, 4: 0.8}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "save_run", after(2, loop.save_run))
        with pytest.raises(Killed):
            script.train(RECIPE, tmp_path / "run")
    assert read_best(tmp_path / "run", RECIPE).step == 4
    assert script.train(RECIPE, tmp_path / "run").best.step == 4
    assert marked(tmp_path / "run") == [1, 4]


def test_a_damaged_model_of_a_finished_run_is_named(script, tmp_path):
    run = tmp_path / "run"
    found = script.train(RECIPE, run).best
    assert script.train(RECIPE, run).best == found
    for folder in ("best", "model"):
        weights = (run / folder / "model.safetensors").read_bytes()
        (run / folder / "model.safetensors").write_bytes(weights[:-9])
        with pytest.raises(BundleError, match=rf"delete .*{folder} and start the run again"):
            script.train(RECIPE, run)
        (run / folder / "model.safetensors").write_bytes(weights)
    config = json.loads((run / "best" / "config.json").read_text())
    del config["vitreg"]["provenance"]["made"]["step"]
    (run / "best" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError, match=r"best does not say its accuracy and its step: delete it"):
        read_best(run, RECIPE)


def test_nothing_that_may_be_published_names_folders_of_the_machine(script, hub, tmp_path, monkeypatch):
    home = tmp_path / "secret_home"
    for split in ("train", "val"):
        for number in range(12):
            file = home / "photos" / split / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (20 * number, 99, 3)).save(file)
    ModelBundle.load("vit_nano_reg4.digits").save(home / "start")
    monkeypatch.chdir(home)
    recipe = replace(
        RECIPE,
        data=replace(RECIPE.data, train=f"{home}/photos/train", test="photos/val"),
        model=replace(RECIPE.model, arch="vit_nano_reg4", start=str(home / "start"), layer_scale=None),
        license=None,
    )
    run = tmp_path / "run"
    monkeypatch.setattr(Publisher, "submit", lambda *args, **options: None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelWriter, "write", before_the_model())
        with pytest.raises(Killed):
            script.train_with_pictures(recipe, run, push="lab/run", push_every="save")
    script.train_with_pictures(recipe, run)  # its own recipe still tells all that has to be the same
    assert (run / "recipe.yaml").read_text() == recipe_to_yaml(recipe)
    for folder in (run / "model", run / "best", *checkpoints(run)):
        for file in folder.iterdir():
            if file.is_file():
                assert b"secret_home" not in file.read_bytes(), file
        told = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert (told["data"]["train"], told["data"]["test"], told["model"]["start"]) == ("train", "photos/val", "start")
        provenance = ModelBundle.load(folder).provenance
        assert provenance.dataset == "train"
        assert provenance.origin.startswith("trained on from start (")
        assert " on train with vitreg_hub's recipe" in provenance.origin
        assert told == provenance.run.recipe
    with pytest.raises(BundleError, match="holds no run"):
        script.train_with_pictures(recipe, run / "model")


@pytest.mark.parametrize("renamed", ["best", "new"])
def test_kill_between_two_renames_leaves_the_old_folder(renamed, tmp_path, monkeypatch):
    def write(text):
        with replaced_folder(tmp_path / "best") as new:
            (new / "file").write_text(text)

    write("old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", renaming(renamed, 1))
        with pytest.raises(Killed):
            write("new")
    clear_leftovers(tmp_path)
    assert (tmp_path / "best" / "file").read_text() == "old"
    write("new")
    assert (tmp_path / "best" / "file").read_text() == "new"
    assert not hidden(tmp_path)


def test_a_run_that_goes_on_in_another_folder_has_a_best_of_its_own(script, uninterrupted, tmp_path):
    start = checkpoints(uninterrupted())[0]
    script.train(RECIPE, tmp_path / "new", resume=str(start))
    assert read_best(tmp_path / "new", RECIPE) == Best(name="accuracy", score=0.5, step=2)  # evaluated at its start
    assert same(tmp_path / "new" / "best", start)
    seldom = replace(RECIPE, watch=replace(RECIPE.watch, eval_every=3))
    script.train(seldom, tmp_path / "first")
    assert read_best(tmp_path / "first", RECIPE).step == 4
    script.train(seldom, tmp_path / "other", resume=str(checkpoints(tmp_path / "first")[0]))
    assert marked(tmp_path / "other") == [3, 4]


def test_full_disk_keeps_the_best_before(script, tmp_path, monkeypatch):
    fill, count = ModelWriter.fill, iter(range(1, 99))

    def full(self, folder, *args, **options):
        fill(self, folder, *args, **options)
        if next(count) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelWriter, "fill", full)
    with pytest.raises(BundleError, match=r"cannot write .*No space left on device"):
        script.train(RECIPE, tmp_path / "run")
    assert read_best(tmp_path / "run", RECIPE).step == 1
    assert not [name for name in hidden(tmp_path / "run") if name != ".best-swap"]
    assert script.train(RECIPE, tmp_path / "run").best.step == 2


def test_both_towers_of_the_best_model(tmp_path):
    recipe = replace(TINY["contrastive"], watch=replace(RECIPE.watch, eval_every=2))
    train(recipe, tmp_path / "run", instruments=NO_PICTURES)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'run' / 'best-open_clip'}").eval()
    trunk, best = model.visual.trunk.state_dict(), weights(tmp_path / "run" / "best")
    assert trunk.keys() <= best.keys()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trunk.items())
    assert not hidden(tmp_path / "run")


def test_what_is_published_is_copied_once_in_a_step(script, tmp_path, monkeypatch):
    copied, copy_whole = [], trainer.copy_whole

    def counted(source, target):
        copied.append(target)
        copy_whole(source, target)

    monkeypatch.setattr(trainer, "copy_whole", counted)
    script.train(replace(RECIPE, watch=replace(RECIPE.watch, save_every=1)), tmp_path / "run")
    assert len(copied) == 1 + STEPS


def test_time_adds_up_over_resumptions(script, tmp_path, monkeypatch):
    clock, do_step = SimpleNamespace(now=1e6), Trainer.do_step

    def slow(self, step, *args):
        clock.now += 10
        if step == 3 and (clock.now < 1e6 + 50):
            raise Killed
        return do_step(self, step, *args)

    monkeypatch.setattr(Trainer, "do_step", slow)
    instruments = replace(NO_PICTURES, measure=script.measure, clock=lambda: clock.now)
    with pytest.raises(Killed):
        train(RECIPE, tmp_path / "run", instruments=instruments)
    clock.now += 1e5  # until somebody saw it
    result = train(RECIPE, tmp_path / "run", instruments=instruments)
    told = {name: ModelBundle.load(tmp_path / "run" / name).provenance.seconds for name in ("best", "model")}
    assert told == {"best": 20.0, "model": 40.0}  # what came after the checkpoint of step 2 was for nothing
    assert result.step == STEPS


def test_a_bundle_tells_by_what_it_was_made(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/vitreg", "train", "tiny", "--out", "/home/me/run"])
    script.train(RECIPE, tmp_path / "run")
    told = ModelBundle.load(tmp_path / "run" / "model").provenance
    assert {"python", "vitreg_hub", "torch", "timm", "accelerate", "datasets"} == told.versions.keys()
    assert torch.__version__.startswith(told.versions["torch"])
    assert told.command == "vitreg train tiny --out run"
    assert told.commit == environment.commit()
    assert told.hardware == environment.hardware()
    assert told.license == "mit"
    assert timedelta() <= datetime.now(UTC) - datetime.fromisoformat(told.created) < timedelta(minutes=30)
    git = ["git", "-C", str(environment.PACKAGE), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    assert told.commit is None or told.commit.removesuffix("-dirty") == head
