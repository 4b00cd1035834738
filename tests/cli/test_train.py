"""`vitreg train`: what it makes of its arguments, and one sentence for each mistake."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from vitreg_hub.cli import main
from vitreg_hub.errors import RecipeError, TrainingError
from vitreg_hub.training import loop
from vitreg_hub.training.recipes.files import recipe_from_yaml, recipe_to_yaml
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.run.measured import Best
from vitreg_hub.training.tasks.dinov2.settings import Head

START = {"accuracy": 0.1}
"""Accuracy before the first step, of the run that is not done."""


@pytest.fixture
def asked(monkeypatch) -> list[SimpleNamespace]:
    """What the loop is asked for, instead of doing it."""
    calls = []

    def train(recipe, out, *, resume="auto", push=None, push_every="end", private=False):
        options = {"resume": resume, "push": push, "push_every": push_every, "private": private}
        calls.append(SimpleNamespace(recipe=recipe, out=out, **options))
        metrics = {"eval/accuracy": 0.98765, "start/accuracy": START["accuracy"], "artifacts/block_0/norm_q50": 11.7}
        best = Best(name="accuracy", score=0.99, step=6)
        commits = {"main": f"hub/{push}/commit/1", "best": f"hub/{push}/commit/2"} if push else {}
        return loop.TrainResult(
            folder=out, step=9, total_steps=9, metrics=metrics, model=out / "model", best=best, commits=commits
        )

    def dry_run(recipe):
        calls.append(SimpleNamespace(recipe=recipe, out=None))
        return loop.DryRun(
            steps=7200, images_per_second=40, eta_seconds=(10800, 14400), memory_gib=3, parameters=2_500_000
        )

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "dry_run", dry_run)
    return calls


def refused(args, capsys) -> str:
    """The sentence on stderr."""
    with pytest.raises(SystemExit) as done:
        main(["train", *args])
    sentence = done.value.code  # sys.exit prints it to stderr and exits with status 1
    assert isinstance(sentence, str)
    assert sentence.startswith("vitreg: ")
    assert "\n" not in sentence
    assert not capsys.readouterr().out
    return sentence


def printed_config(args, capsys) -> str:
    main(["train", *args, "--print_config"])
    return capsys.readouterr().out


def test_trains_the_recipe_and_says_what_came_of_it(asked, capsys):
    main(["train", "supervised_digits", "--out", "runs/a"])
    (call,) = asked
    assert call.recipe == RECIPES["supervised_digits"]()
    assert (call.out, call.resume, call.push, call.push_every) == (Path("runs/a"), "auto", None, "end")
    out = capsys.readouterr().out
    assert re.search(r"^accuracy +0\.9877$", out, re.MULTILINE)
    assert "model    runs/a/model\nbest     runs/a/best, accuracy 0.99 after step 6\n" in out
    assert "norm_q50" not in out
    assert "pushed" not in out
    assert "\n  vitreg verify runs/a/best\n" in out  # which is better than the last one
    assert "\n  vitreg push runs/a/best your-name/supervised_digits\n" in out


def test_a_model_below_the_start_is_not_offered(asked, capsys, monkeypatch):
    monkeypatch.setitem(START, "accuracy", 0.995)
    main(["train", "supervised_digits", "--out", "runs/a"])
    out = capsys.readouterr().out
    assert "best     runs/a/best, accuracy 0.99 after step 6: below the start, 0.995\n" in out
    assert "no model of this run is as good as its start: lower optim.lr" in out
    assert "vitreg push" not in out


def test_a_file_alone_is_a_recipe(asked, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    whole = recipe_to_yaml(RECIPES["dinov2_digits"](registers=1))
    for text, seed in ((whole, 0), (whole.replace("dinov2_digits", "my own"), 0), ("name: dinov2_digits\nseed: 7", 7)):
        file.write_text(text)
        main(["train", "--config", str(file), "--batch_size", "8", "--out", "x"])
        assert (asked[-1].recipe.batch_size, asked[-1].recipe.seed) == (8, seed)
    assert [call.recipe.name for call in asked] == ["dinov2_digits", "my own", "dinov2_digits"]
    assert [call.recipe.model.arch for call in asked] == ["vit_nano_reg1", "vit_nano_reg1", "vit_nano_reg4"]
    capsys.readouterr()
    file.write_text("seed: 7")
    assert "mine.yaml does not say its recipe: add its name" in refused([f"--config={file}", "--out", "x"], capsys)
    file.write_text("name: mine\nseed: 7")
    assert "mine.yaml is not a complete recipe" in refused([f"--config={file}", "--out", "x"], capsys)


def test_options_of_the_run(asked, capsys):
    main(["train", "dinov2_digits", "--registers", "8", "--out", "x", "--resume", "x/checkpoints/step_3", "--push=a/b"])
    main(
        ["train", "dinov2_digits", "--resume=never", "--push", "a/b", "--push-every", "save", "--private", "--out", "x"]
    )
    first, second = asked
    assert first.recipe == RECIPES["dinov2_digits"](registers=8)
    assert (first.resume, first.push, first.push_every) == ("x/checkpoints/step_3", "a/b", "end")
    assert (second.resume, second.push, second.push_every) == ("never", "a/b", "save")
    assert (first.private, second.private) == (False, True)
    out = capsys.readouterr().out
    assert "pushed   hub/a/b/commit/1 (main)\npushed   hub/a/b/commit/2 (best)\n" in out


def test_dry_run_needs_no_folder(asked, capsys):
    main(["train", "deit3_small", "--dry-run", "--batch_size", "4"])
    assert asked[0].out is None
    assert asked[0].recipe.batch_size == 4
    out = capsys.readouterr().out
    assert "3.0 hours to 4.0 hours" in out
    assert "3.00 GiB" in out
    assert "2.5 M" in out


def test_stopped_run(asked, capsys, monkeypatch):
    stopped = loop.TrainResult(folder=Path("x"), step=3, total_steps=9, commits={"main": "hub/a/b/commit/1"})
    monkeypatch.setattr(loop, "train", lambda *args, **options: stopped)
    main(["train", "supervised_digits", "--out", "x"])
    assert capsys.readouterr().out == (
        "stopped  after step 3 of 9; the same command goes on\npushed   hub/a/b/commit/1 (main)\n"
    )


OVERRIDES = {
    "--optim.lr 5e-4": ("optim.lr", 5e-4),
    "--optim.lr=1": ("optim.lr", 1.0),
    "--task.dino_head.prototypes 1024": ("task.dino_head.prototypes", 1024),
    "--augment.num_local 2": ("augment.num_local", 2),
    "--augment.blur [0,.5,1]": ("augment.blur", (0.0, 0.5, 1.0)),
    "--task.momentum [.9,.99]": ("task.momentum", (0.9, 0.99)),
    "--task.momentum .9,.99": ("task.momentum", (0.9, 0.99)),
    "--watch.trackers tensorboard": ("watch.trackers", ("tensorboard",)),
    "--watch.trackers=tensorboard,wandb": ("watch.trackers", ("tensorboard", "wandb")),
    "--watch.eval_every null": ("watch.eval_every", None),
    "--model.trainable last:2": ("model.trainable", "last:2"),
    "--watch.trackers [tensorboard,wandb]": ("watch.trackers", ("tensorboard", "wandb")),
    "--watch.cutoff 12.5": ("watch.cutoff", 12.5),
    "--optim.clip null": ("optim.clip", None),
    "--scale.precision fp16": ("scale.precision", "fp16"),
    "--scale.compile true": ("scale.compile", True),
    "--data.test digits": ("data.test", "digits"),
    "--epochs 0.5": ("epochs", 0.5),
    "--epoch_steps 7": ("epoch_steps", 7),
    "--name mine": ("name", "mine"),
    "--task.ibot_head.prototypes 512": ("task.ibot_head", Head(prototypes=512)),
    "--task.ibot_head null": ("task.ibot_head", None),
    "--model.arch vit_tiny_reg16": ("model.arch", "vit_tiny_reg16"),
}


@pytest.mark.parametrize("option", OVERRIDES)
def test_override(option, asked):
    main(["train", "dinov2_digits", *option.split(), "--out", "x"])
    recipe, name, value = asked[0].recipe, *OVERRIDES[option]
    found = recipe
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    plain, default = (yaml.safe_load(recipe_to_yaml(r)) for r in (recipe, RECIPES["dinov2_digits"]()))
    group = plain
    for part in name.split(".")[:-1]:
        group, default = group[part], default[part]
    assert {k: v for k, v in group.items() if k != name.split(".")[-1]}.items() <= default.items()


def test_parts_of_a_head_that_the_recipe_has(asked):
    main(["train", "dinov2_vitl14", "--task.ibot_head.hidden", "512", "--out", "x"])
    assert asked[0].recipe.task.ibot_head == Head(prototypes=131072, bottleneck=256, hidden=512, layers=3)


def test_mixup(asked):
    main(["train", "supervised_digits", "--task.mixup", "0.8", "--out", "x"])
    assert asked[0].recipe.task.mixup == 0.8


@pytest.mark.parametrize("name", RECIPES)
def test_printed_config_gives_an_equal_recipe(name, asked, capsys, tmp_path):
    changes = ["--registers", "2", "--optim.lr", "3e-7", "--watch.trackers", "[a]", "--optim.eps", "1e-5"]
    text = printed_config([name, *changes, "--model.start=x"], capsys)
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    main(["train", name, "--config", str(file), "--out", "x"])
    assert asked[0].recipe == recipe_from_yaml(text)
    assert asked[0].recipe.optim.lr == 3e-7
    assert asked[0].recipe.model.arch == RECIPES[name](registers=2).model.arch


def test_options_come_after_files_and_files_after_each_other(asked, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 5e-4, betas: [0.8, 0.9]}\nseed: 7\n")
    (tmp_path / "b.yaml").write_text("optim: {lr: 6e-4}\ntask: {kind: Supervised, ema: 0.9}\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    main(["train", "supervised_digits", "--seed", "9", *files, "--out", "x"])
    recipe = asked[0].recipe
    assert (recipe.optim.lr, recipe.optim.betas, recipe.seed, recipe.task.ema) == (6e-4, (0.8, 0.9), 9, 0.9)


MISTAKES = {
    "give a recipe: vitreg train RECIPE": "",
    "the recipe comes first, not --out": "--out x supervised_digits",
    "there is no recipe supervised_digts: did you mean supervised_digits?": "supervised_digts --out x",
    "there is no recipe zzz: `vitreg train --help` lists all 20.": "zzz",
    "give --out, the folder of the run": "supervised_digits",
    "recipe supervised_digits has no setting optim.lrr: did you mean optim.lr?": "supervised_digits --optim.lrr 3",
    "has no setting lr: did you mean optim.lr?": "supervised_digits --lr=3",
    "has no setting outt: did you mean out?": "supervised_digits --outt x",
    "has no setting task.prototypes: `vitreg train": "supervised_digits --task.prototypes 3",
    "has no setting task.kind: `vitreg train": "supervised_digits --task.kind DinoV2",
    "no setting task.ibot_head.protypes: did you mean task.ibot_head.prototypes?": "dinov2_digits "
    "--task.ibot_head.protypes 3",
    "unrecognized arguments: junk.": "supervised_digits junk --out x",
    "optim.lr takes a number, not 'abc'.": "supervised_digits --optim.lr abc --out x",
    "batch_size takes a whole number, not '3.5'.": "supervised_digits --batch_size 3.5",
    "optim.betas takes a list [a number, a number] or null, not '[1, 2, 3]'.": "dinov2_vitl14 --optim.betas [1,2,3]",
    "scale.precision takes one of no, bf16, fp16, not 'fp8'.": "supervised_digits --scale.precision fp8",
    "scale.compile takes true or false, not 'maybe'.": "supervised_digits --scale.compile maybe",
    "optim.clip takes a number or null, not 'x'.": "supervised_digits --optim.clip x",
    "task.ibot_head.prototypes takes a whole number, not 'x'.": "dinov2_digits --task.ibot_head.prototypes x",
    "argument --optim.lr: expected one argument.": "supervised_digits --optim.lr",
    "has 3 registers: give one of 0, 1, 2, 4, 8, 16.": "supervised_digits --registers 3",
    "argument --registers: invalid int value: 'x'.": "supervised_digits --registers x",
    "--registers 0 contradicts model.arch vit_nano_reg4, which has 4": "supervised_digits --registers 0 "
    "--model.arch vit_nano_reg4 --out x",
    "no architecture 'vit_nan_reg4'; closest: vit_nano_reg4": "supervised_digits --model.arch vit_nan_reg4",
    "deit3_base_finetune_384 goes on with a trained model: give model.start": "deit3_base_finetune_384 --out x",
    "set it to 0, or task.loss to ce.": "deit3_base --task.smoothing .1 --out x",
    "batch_size is 33, but mixup and cutmix take images in pairs": "deit3_base --batch_size 33 --out x",
    "argument --push-every: invalid choice: 'now'": "supervised_digits --push-every now --out x",
    "cannot read nothing.yaml: No such file or directory.": "supervised_digits --config nothing.yaml --out x",
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistake_is_one_sentence(says, asked, capsys):
    assert says in refused(MISTAKES[says].split(), capsys)
    assert not asked


FILE_MISTAKES = {
    "has no setting optim.lrr: did you mean optim.lr?": "optim: {lrr: 3}",
    "has no setting lr: did you mean optim.lr?": "lr: 3",
    "has no setting optmi: did you mean optim?": "optmi: {}",
    "optim.lr takes a number, not 'abc'.": "optim: {lr: abc}",
    "optim.lr takes a number, not null.": "optim: {lr: }",
    "has optim.lr: give settings nested, as": "optim.lr: 3",
    "optim.lr takes a number, not 'True'.": "optim: {lr: yes}",
    "optim takes its own settings, not 3.": "optim: 3",
    "optim takes its own settings, not null.": "optim:",
    "task.ibot_head takes its own settings or null, not '3'.": "task: {ibot_head: 3}",
    "task.ibot_head.prototypes takes a whole number, not 'x'.": "task: {ibot_head: {prototypes: x}}",
    "task of the kind Supervised, but that of recipe dinov2_digits is DinoV2": "task: {kind: Supervised}",
    "is not YAML: ": "optim: [",
    "holds no settings: give them nested": "- 1",
    "holds no settings: give": "",
    "batch_size is 0, give at least 1.": "batch_size: 0",
}


@pytest.mark.parametrize("says", FILE_MISTAKES)
def test_mistake_in_a_file_is_one_sentence(says, asked, capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(FILE_MISTAKES[says])
    sentence = refused(["dinov2_digits", "--config", str(file), "--out", "x"], capsys)
    assert says in sentence
    assert str(file) in sentence or "recipe dinov2_digits" in sentence
    assert not asked


def test_help_lists_recipes_and_examples(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert re.search(rf"^  {name} +{re.escape(recipe.__doc__.partition(chr(10))[0])}$", out, re.MULTILINE)
    assert "accelerate launch --num_processes 8 -m vitreg_hub.training" in out
    assert "DIR/best" in out
    assert "hf-hub:org/name@best" in out
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "vitreg train supervised_digits" in out
    assert re.search(r"^    train +Train a Vision", out, re.MULTILINE)


def test_help_of_a_recipe_shows_every_setting_with_value_and_meaning(capsys):
    main(["train", "dinov2_vitl14", "-h", "--registers", "0"])
    out = " ".join(capsys.readouterr().out.split())
    assert "width 2736, for which there is no row" in out
    assert "task (DinoV2): Self-distillation with DINO, iBOT and KoLeo losses. Registers take no loss:" in out
    assert "Peak learning rate. (type: float, default: 0.0002)" in out
    assert "default: vit_large_reg0)" in out
    assert "--resume" in out

    def options(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict) and key != "ibot_head":
                yield from options(value, f"{prefix}{key}.")
            elif key != "kind":
                yield f"--{prefix}{key} "

    for option in options(yaml.safe_load(recipe_to_yaml(RECIPES["dinov2_vitl14"]()))):
        assert option in out


@pytest.mark.parametrize("example", [pytest.param(e, id=e[:60]) for e in ("digits", "ssl", "run", "fine")])
def test_examples_in_the_help_are_accepted(example, asked, capsys):
    main(["train", "--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  vitreg train ")]
    chosen = [line for line in lines if f"--out {example}" in line and "mine.yaml" not in line]
    assert chosen
    for line in chosen:
        words = re.split(r"\s{3,}", line.strip())[0].split()
        main(words[1:])
    assert len(asked) == len(chosen)


def test_first_process_alone_reports_a_wrong_setting(monkeypatch, capsys, asked):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as done:
        main(["train", "zzz"])
    assert done.value.code == 1

    def fail(*args, **options):
        raise TrainingError("the disk of this process is full.")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(SystemExit) as done:  # what the others cannot know of
        main(["train", "supervised_digits", "--out", "x"])
    assert done.value.code == "vitreg: the disk of this process is full."


def test_interrupted(monkeypatch, asked, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupt)
    with pytest.raises(SystemExit) as done:
        main(["train", "supervised_digits", "--out", "x"])
    assert done.value.code == 130
    assert capsys.readouterr().err == "vitreg: interrupted\n"


def test_bug_keeps_its_traceback(monkeypatch, asked):
    def fail(*args, **options):
        raise ValueError("a bug")

    monkeypatch.setattr(loop, "train", fail)
    with pytest.raises(ValueError, match="a bug") as caught:
        main(["train", "supervised_digits", "--out", "x"])
    assert not isinstance(caught.value, RecipeError)


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "vitreg_hub.training"]
    run = subprocess.run(
        [*command, "supervised_digits", "--optim.lrr", "1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr == "vitreg: recipe supervised_digits has no setting optim.lrr: did you mean optim.lr?\n"
