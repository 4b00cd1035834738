"""What a whole run does: what it writes, what it leaves alone, what it refuses."""

import itertools
import json
import logging
import math
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from models import random_bundle
from PIL import Image
from safetensors.torch import load_file, save_file
from training_files import png, write_folder
from training_runs import RUN, STEPS, TINY, lines, losses, with_scale

from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import DataError, RecipeError, VitregError
from vitreg_hub.images.embedded import digits
from vitreg_hub.training.loop import dry_run, train
from vitreg_hub.training.recipes.files import recipe_from_yaml
from vitreg_hub.training.recipes.settings import DataSettings, OptimSettings
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.run.state import write_state
from vitreg_hub.training.schedules import Span
from vitreg_hub.training.tasks.supervised.settings import Supervised

pytestmark = pytest.mark.usefixtures("warm")

SUPERVISED, DINOV2 = TINY["supervised"], TINY["dinov2"]
START = "vit_nano_reg4.digits"


def changed(recipe, **parts):
    """A recipe with settings of its parts changed: ``changed(recipe, model={"start": ...}, epochs=1)``."""
    return replace(
        recipe, **{k: replace(getattr(recipe, k), **v) if isinstance(v, dict) else v for k, v in parts.items()}
    )


def test_a_run_leaves_everything_behind(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub")
    run = tmp_path / "run"
    recipe = changed(SUPERVISED, watch={"eval_every": 2, "save_every": 1, "keep": 2})
    result = train(recipe, run)
    assert {path.name for path in run.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "first_batch.png", "curves.png", "checkpoints", "model", "best")
    }
    assert recipe_from_yaml((run / "recipe.yaml").read_text()) == recipe
    assert [path.name for path in checkpoints(run)] == ["step_0000003", "step_0000004"]
    assert set(verify(run / "model").values()) == {0.0}
    with Image.open(run / "first_batch.png") as picture:
        assert picture.height > 500

    told = lines(run)
    assert [line["step"] for line in told if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in told if "eval/accuracy" in line] == [0, 2, 4]
    assert [line["lr"] for line in told if "lr" in line][:2] == [0.0, 1e-3]  # two steps of warm-up
    last = told[-1]
    assert {f"artifacts/block_{i}/outlier_fraction" for i in range(4)} <= last.keys()
    assert {"artifacts/block_3/register_2_norm", "artifacts/class_attention_on_registers"} <= last.keys()
    assert {"images_per_second", "data_wait", "eta_seconds", "memory_gib"} <= told[-2].keys() | told[-3].keys()
    assert any("step 4/4 (100 %)" in message for message in caplog.messages)

    bundle = ModelBundle.load(run / "model")
    assert result.metrics["eval/accuracy"] == bundle.provenance.metrics["accuracy"] == last["eval/accuracy"]
    assert bundle.provenance.run.recipe["optim"]["lr"] == 1e-3
    assert bundle.provenance.run.step == STEPS
    assert bundle.label_names == tuple("0123456789")


def test_published_model_scores_what_was_written_down(tmp_path):
    result = train(changed(SUPERVISED, watch={"eval_images": 10_000}), tmp_path / "run")
    model = ModelBundle.load(result.model).build()
    data = digits("test")
    pixels = torch.stack([torch.from_numpy(np.asarray(image.resize((32, 32), 3))) for image in data["image"]])
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    with torch.no_grad():
        found = model(((pixels / 255 - mean) / std).permute(0, 3, 1, 2)).argmax(1)
    accuracy = (found == torch.tensor(data["label"][:])).float().mean().item()
    assert result.metrics["eval/accuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("trainable", ["registers", "registers+norms"])
def test_what_is_not_trained_stays_bit_equal(name, trainable, tmp_path):
    recipe = changed(TINY[name], model={"arch": "vit_nano_reg4", "start": START, "trainable": trainable})
    if name == "contrastive":
        recipe = changed(recipe, optim={"weight_decay": 0.5})
    train(recipe, tmp_path / "run")
    before = ModelBundle.load(START).state_dict
    weights = {"model": load_file(tmp_path / "run" / "model" / "model.safetensors")}
    weights["network"] = load_file(checkpoints(tmp_path / "run")[-1] / "state" / "backbone.safetensors")
    for tensors in weights.values():
        for key, tensor in tensors.items():
            if key == "mask_token" or key.startswith("head."):
                continue  # the task's own; the head is trained data of another task, if there is one
            moved = key == "reg_token" or (trainable == "registers+norms" and "norm" in key)
            assert torch.equal(tensor, before[key]) != moved, key
    if name == "supervised":
        assert torch.equal(weights["model"]["head.weight"], before["head.weight"])


@pytest.mark.parametrize("name", ["supervised", "distill"])
def test_parts_of_a_step_add_up(name, tmp_path):
    """Losses that see single images only are the same however a step is cut; mixed pairs stay together."""
    # plain descent, for Adam does not see whether gradients are four times too large
    recipe = replace(TINY[name], optim=OptimSettings(opt="sgd", betas=None, lr=0.02, weight_decay=0.0))
    train(recipe, tmp_path / "one")
    train(with_scale(recipe, accumulate=4), tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_low_rank_changes_are_merged(tmp_path):
    model = {"arch": "vit_nano_reg4", "start": START, "trainable": "lora", "lora_rank": 2}
    recipe = changed(SUPERVISED, model=model, optim={"lr": 0.01}, watch={"artifact_images": 0, "save_every": 2})
    result = train(recipe, tmp_path / "run")
    before = ModelBundle.load(START).state_dict
    state = load_file(checkpoints(tmp_path / "run")[-1] / "state" / "ema.safetensors")
    for key, tensor in load_file(result.model / "model.safetensors").items():
        change = tensor - before[key]
        if key.endswith(("attn.qkv.weight", "attn.proj.weight")):
            layer = f"backbone.{key.removesuffix('.weight')}.parametrizations.weight"
            torch.testing.assert_close(change, state[f"{layer}.0.up"] @ state[f"{layer}.0.down"], atol=1e-6, rtol=1e-4)
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == 2
        else:
            assert change.any() == key.startswith("head."), key
    assert not any(verify(result.model).values())
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    for folder in ("model", "best", "checkpoints/step_0000004"):
        shutil.rmtree(tmp_path / "killed" / folder)
    again = load_file(train(recipe, tmp_path / "killed").model / "model.safetensors")
    assert all(torch.equal(x, again[key]) for key, x in load_file(result.model / "model.safetensors").items())


@pytest.mark.parametrize(
    ("trainable", "parts"), [("head", ("head.",)), ("last:2", ("head.", "blocks.2.", "blocks.3.", "norm."))]
)
def test_only_the_last_parts_are_trained(trainable, parts, tmp_path):
    data = {"train": "scenes", "test": "scenes"}  # of other classes, for which there is a new head
    model = {"arch": "vit_nano_reg4", "start": START, "trainable": trainable}
    train(changed(SUPERVISED, model=model, data=data, watch={"artifact_images": 0}), tmp_path / "run")
    before = ModelBundle.load(START).state_dict
    for key, tensor in load_file(tmp_path / "run" / "model" / "model.safetensors").items():
        assert (tensor.shape == before[key].shape and torch.equal(tensor, before[key])) != key.startswith(parts), key


@pytest.mark.parametrize("name", TINY)
def test_checkpointing_and_workers_change_nothing(name, tmp_path):
    train(TINY[name], tmp_path / "plain")
    recipe = with_scale(TINY[name], checkpointing=True)
    train(changed(recipe, data={"num_workers": 2}), tmp_path / "other")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)


def test_checkpointing_keeps_fewer_activations():
    """As upstream's wrappers were found not to: the flag must reach the blocks (lightly-ai/lightly#2054)."""
    from vitreg_hub.training.run.assembly import make_accelerator
    from vitreg_hub.training.run.trainer import Trainer

    held = {}
    for flag in (False, True):
        recipe = with_scale(changed(DINOV2, batch_size=16), checkpointing=flag)
        trainer = Trainer(recipe, make_accelerator(recipe))
        batch = next(trainer.parts.loader.batches(0, 1))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            trainer.parts.task.training_step(trainer.network, batch)
        held[flag] = sum(sizes)
    assert held[True] < 0.5 * held[False]


@pytest.mark.parametrize("name", ["supervised", "dinov2"])
def test_bfloat16_is_close(name, tmp_path):
    train(TINY[name], tmp_path / "full")
    train(with_scale(TINY[name], precision="bf16"), tmp_path / "half")
    full, half = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert half == pytest.approx(full, rel=0.03)
    assert half != pytest.approx(full, rel=1e-6)
    weights = load_file(checkpoints(tmp_path / "half")[-1] / "state" / "backbone.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_continued_run_starts_where_its_start_was(tmp_path):
    """New heads first: the backbone, and with it what it is good for, does not move meanwhile."""
    task = {"heads_first_epochs": 1, "freeze_last_layer_epochs": 0}
    recipe = changed(DINOV2, model={"arch": "vit_nano_reg4", "start": START}, task=task, watch={"eval_every": 1})
    train(recipe, tmp_path / "run")
    scores = [line["eval/knn_accuracy"] for line in lines(tmp_path / "run") if "eval/knn_accuracy" in line]
    assert scores[:3] == [scores[0]] * 3  # two steps of heads
    held = checkpoints(tmp_path / "run")[-1] / "state"
    assert not torch.equal(
        load_file(held / "backbone.safetensors")["cls_token"], ModelBundle.load(START).state_dict["cls_token"]
    )

    given = changed(
        recipe, task={"heads_first_epochs": 0, "heads": str(held.parent)}, watch={"save_every": 1, "keep": 9}
    )
    train(given, tmp_path / "again")
    first, heads = (load_file(f / "heads.safetensors") for f in (checkpoints(tmp_path / "again")[0] / "state", held))
    assert first.keys() == heads.keys()
    for key, tensor in heads.items():
        torch.testing.assert_close(first[key], tensor, atol=2e-3, rtol=0)  # one step on, of a warm-up from 0


def test_heads_that_are_not_as_they_were_written_are_refused(tmp_path):
    heads = {"x": torch.ones(1)}
    checkpoint = tmp_path / "step_0000001"
    checkpoint.mkdir()
    write_state(checkpoint, {"heads": heads}, {"step": 1})
    save_file({"x": torch.zeros(1)}, checkpoint / "state" / "heads.safetensors")
    with pytest.raises(RecipeError, match=r"task\.heads .* \(heads\.safetensors is not as it was written\)"):
        train(changed(DINOV2, task={"heads": str(checkpoint)}), tmp_path / "run")


def test_heads_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"task\.heads"):
        train(changed(DINOV2, task={"heads": str(tmp_path)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_registers_are_added_to_a_start(tmp_path):
    recipe = changed(TINY["distill"], model={"arch": "vit_nano_reg8", "start": START})
    result = train(recipe, tmp_path / "run")
    assert ModelBundle.load(result.model).build().num_reg_tokens == 8


def test_contrastive_is_saved_for_open_clip_too(tmp_path):
    result = train(TINY["contrastive"], tmp_path / "run")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'run' / 'model-open_clip'}")
    vit = ModelBundle.load(result.model).build()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        projected = vit.forward_head(vit.forward_features(images), pre_logits=True) @ model.visual.head.proj.weight.T
        torch.testing.assert_close(model.eval().encode_image(images), projected, atol=1e-5, rtol=1e-5)


def test_pictures_without_labels_and_a_test_set(tmp_path, caplog):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    data = DataSettings(train=str(tmp_path), max_corrupt=0.2)
    train(replace(DINOV2, data=data, batch_size=4), tmp_path / "run")
    told = lines(tmp_path / "run")
    assert any("artifacts/block_0/outlier_fraction" in line for line in told)
    assert not any("eval/knn_accuracy" in line for line in told)
    named = [message for message in caplog.messages if "cannot be read and was replaced" in message]
    assert len(named) == 1
    assert str(tmp_path / "broken.jpg") in named[0]
    assert max(line.get("unreadable_images", 0) for line in told) == 1
    cannot = "there will be no knn_accuracy and no best model: no images are held out of"
    assert len([message for message in caplog.messages if message.startswith(cannot)]) == 1
    with pytest.raises(DataError, match=r"1 images of .* cannot be read, .*broken.jpg"):
        train(replace(DINOV2, data=replace(data, max_corrupt=0.01), batch_size=4, epochs=4), tmp_path / "other")


CANNOT = {
    "no accuracy and no knn_accuracy and no best model: {flat} has no labels": {"test": "flat"},
    "no accuracy and no knn_accuracy and no best model: no images are held out of {train}": {},
    "no accuracy and no knn_accuracy and no best model: no image of {broken} that can be read": {"test": "broken"},
    None: {"test": "stray"},
}
"""What is said before training, by what is held out."""


@pytest.mark.parametrize("says", CANNOT)
def test_what_an_evaluation_cannot_do_is_said_at_the_start(says, tmp_path, caplog):
    folders = {name: tmp_path / name for name in ("train", "flat", "broken", "stray")}
    for name in ("train", "stray"):
        write_folder(folders[name], 9)
    write_folder(folders["flat"], 9, classes=(".",))
    (folders["stray"] / "sheet.png").write_bytes(png(1))
    for name in "abc":
        (folders["broken"] / name).mkdir(parents=True)
        (folders["broken"] / name / "1.png").write_bytes(b"no picture")
    data = DataSettings(train=str(folders["train"]), **{key: str(folders[name]) for key, name in CANNOT[says].items()})
    recipe = changed(SUPERVISED, data=data, epochs=0.5, optim={"warmup_epochs": 0}, task={"ema": None})
    result = train(recipe, tmp_path / "run")
    said = [message for message in caplog.messages if message.startswith("there will be")]
    assert [message.startswith(f"there will be {says.format(**folders)}") for message in said] == [True] * bool(says)
    assert (result.best is None) == bool(says)
    assert ("eval/accuracy" in result.metrics) == (says is None)


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run(changed(SUPERVISED, epochs=10))
    assert found.steps == 20
    assert found.images_per_second > 0
    shortest, longest = found.eta_seconds
    assert shortest <= 20 * 8 / found.images_per_second <= longest
    assert found.memory_gib > 0.1
    parameters = sum(t.numel() for t in ModelBundle.load("vit_nano_reg0.digits").state_dict.values())
    assert found.parameters == parameters + 2 * 128
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "timed"), [((50, 9, 8, 1, 3, 2), (1, 3)), ((99, 7), (7, 7)), ((1, 30, 5), (30, 30))]
)
def test_dry_run_times_no_warm_up_and_gives_a_range(seconds, timed):
    """After 20 seconds it stops."""
    recipe = changed(SUPERVISED, epochs=len(seconds) / 2, optim={"warmup_epochs": 0}, watch={"artifact_images": 0})
    times = iter([0.0, *itertools.accumulate(map(float, seconds))])
    found = dry_run(recipe, clock=lambda: next(times))
    assert found.eta_seconds == tuple(len(seconds) * second for second in timed)


def test_a_run_changes_no_global_random_number(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(SUPERVISED, tmp_path / "run")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


REFUSED = {
    "fp16 without a GPU": (
        changed(SUPERVISED, scale={"precision": "fp16"}),
        "scale.precision is fp16, which needs a GPU",
    ),
    "batch and parts": (changed(SUPERVISED, scale={"accumulate": 3}), "batch_size is 8, which 1 processes times"),
    "no such data": (changed(SUPERVISED, data={"train": "digitz"}), "there are no training data 'digitz'.*'digits'"),
    "no captions": (replace(TINY["contrastive"], data=DataSettings(train="digits")), "digits has no texts"),
    "batch too large": (changed(SUPERVISED, batch_size=5000), "digits has 1438 images, which is less than one batch"),
    "no such optimiser": (changed(SUPERVISED, optim={"opt": "adamz"}), "optim.opt 'adamz' cannot be made"),
    "muon in pieces": (
        changed(SUPERVISED, optim={"opt": "nadamuon"}, scale={"sharding": "fsdp2"}),
        "needs whole matrices",
    ),
    "no such tracker": (
        changed(SUPERVISED, watch={"trackers": ("wandbb",)}),
        "no tracker 'wandbb', did you mean 'wandb'",
    ),
    "no registers to train": (
        changed(SUPERVISED, model={"arch": "vit_nano_reg0", "start": "vit_nano_reg0.digits", "trainable": "registers"}),
        "no registers",
    ),
    "registers of nothing": (changed(SUPERVISED, model={"trainable": "registers"}), r"there is no model\.start"),
    "a random head that is not trained": (
        changed(
            SUPERVISED,
            data={"train": "scenes"},
            model={"arch": "vit_nano_reg4", "start": START, "trainable": "registers"},
        ),
        "has 10 classes and the data have 48",
    ),
    "warm-up longer than the run": (changed(SUPERVISED, optim={"warmup_epochs": 9}), "a schedule of 4 steps"),
    "averages that keep their start": (
        changed(SUPERVISED, task={"ema": 0.99996, "ema_warmup": False}),
        "task.ema 0.99996 is for longer runs than 4 steps, where it would leave 100% of the start: set task.ema_warmup",
    ),
    "no head to train": (
        changed(DINOV2, model={"arch": "vit_nano_reg4", "start": START, "trainable": "head"}),
        "model.trainable is head, but this task has no classifier",
    ),
    "more blocks than there are": (
        changed(SUPERVISED, model={"arch": "vit_nano_reg4", "start": START, "trainable": "last:5"}),
        "model.trainable is last:5, but the network has 4 blocks",
    ),
    "no head to keep": (
        changed(SUPERVISED, data={"train": "scenes"}, model={"arch": "vit_nano_reg4", "start": START, "head": "kept"}),
        "model.head is kept, but model.start .* has 10 classes and the data have 48",
    ),
    "other classes held out": (changed(SUPERVISED, data={"test": "photos"}), "photos has the class 'china'"),
    "patch that does not divide": (changed(SUPERVISED, model={"img_size": 30}), "30"),
    "unknown architecture": (changed(SUPERVISED, model={"arch": "vit_nano_reg5"}), "vit_nano_reg5"),
    "untrained teacher": (changed(TINY["distill"], task={"teacher": "vit_nano_reg8"}), "has no weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_in_one_sentence_and_nothing_is_written(case, tmp_path):
    recipe, message = REFUSED[case]
    with pytest.raises(VitregError, match=message) as error:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_contradictions_are_refused_when_a_recipe_is_made():
    with pytest.raises(RecipeError, match=r"task\.smoothing is 0\.1 under the loss bce"):
        changed(SUPERVISED, task={"smoothing": 0.1})
    with pytest.raises(RecipeError, match="batch_size is 7, but mixup"):
        changed(SUPERVISED, batch_size=7)
    with pytest.raises(RecipeError, match="DinoV2 does not go with CropAugment"):
        replace(DINOV2, augment=SUPERVISED.augment)
    with pytest.raises(RecipeError, match="epochs is 0"):
        changed(SUPERVISED, epochs=0)


def test_bce_and_ce_are_deits():
    """Against the lines of deit/engine.py and timm's loss that deit/main.py takes."""
    from timm.loss import SoftTargetCrossEntropy

    from vitreg_hub.training.tasks.supervised.task import classification_loss

    logits, targets = torch.randn(6, 5), torch.rand(6, 5).softmax(1) * (torch.rand(6, 5) > 0.4)
    expected = torch.nn.BCEWithLogitsLoss()(logits, targets.gt(0.0).type(targets.dtype))
    torch.testing.assert_close(classification_loss(logits, targets, kind="bce"), expected)
    torch.testing.assert_close(
        classification_loss(logits, targets, kind="ce"), SoftTargetCrossEntropy()(logits, targets)
    )


@pytest.mark.parametrize(("warmup", "decay"), [(False, 0.7), (True, 0.7), (True, 0.3)])
def test_averaged_weights_are_timms(warmup, decay):
    """Against timm's ModelEmaV3 over the same sequence of weights."""
    from timm.utils import ModelEmaV3

    from vitreg_hub.training.tasks.supervised.task import SupervisedTask

    backbone = ModelBundle.load(START).build()
    run = replace(RUN, span=Span(epoch_steps=9, total_steps=9))
    task = SupervisedTask(Supervised(ema=decay, ema_warmup=warmup), backbone, run)
    reference = ModelEmaV3(task.network, decay=decay, use_warmup=warmup)
    for step in range(9):
        with torch.no_grad():
            for parameter in task.network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        task.after_step(step)
        reference.update(task.network, step=step + 1 if warmup else None)
    ours, theirs = task.published.state_dict(), reference.module.state_dict()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-6)


def test_averaged_weights_leave_their_start(tmp_path, caplog):
    """With 0.98 from the first step on, two thirds of the start would be left after 20 steps."""
    recipe = changed(
        SUPERVISED,
        task={"ema": 0.98, "mixup": 0.0, "cutmix": 0.0},
        optim={"lr": 0.02, "warmup_epochs": 0},
        watch={"artifact_images": 0},
        epochs=10,
    )
    result = train(recipe, tmp_path / "run")
    state = checkpoints(tmp_path / "run")[-1] / "state"
    start = train(changed(recipe, optim={"lr": 0.0}), tmp_path / "start").model
    before = load_file(start / "model.safetensors")["head.weight"]
    raw = load_file(state / "backbone.safetensors")["head.weight"]
    averaged = load_file(state / "ema.safetensors")["backbone.head.weight"]
    assert (averaged - before).norm() > 0.6 * (raw - before).norm()
    assert any("0.98^20" in message or "would leave 67% of the start" in message for message in caplog.messages)
    assert {"eval/accuracy", "raw/accuracy"} <= lines(tmp_path / "run")[-1].keys()
    assert result.metrics["eval/accuracy"] != result.metrics["raw/accuracy"]
    assert "raw/accuracy" not in ModelBundle.load(result.model).provenance.metrics
    assert torch.equal(load_file(result.model / "model.safetensors")["head.weight"], averaged)
    other = train(changed(recipe, task={"publish": "raw"}), tmp_path / "raw")
    assert other.metrics["eval/accuracy"] == result.metrics["raw/accuracy"]
    assert other.metrics["averaged/accuracy"] == result.metrics["eval/accuracy"]
    assert torch.equal(load_file(other.model / "model.safetensors")["head.weight"], raw)


def test_metrics_are_finite(tmp_path):
    train(DINOV2, tmp_path / "run")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values())


def test_a_bundle_tells_its_whole_recipe(tmp_path):
    result = train(DINOV2, tmp_path / "run")
    run = ModelBundle.load(result.model).provenance.run
    assert (run.step, run.total_steps) == (STEPS, STEPS)
    assert run.evaluated == DINOV2.watch.eval_images
    assert recipe_from_yaml(json.dumps(run.recipe)) == DINOV2


def test_models_of_one_channel_train_on_grey_pictures(tmp_path):
    random_bundle("vit_nano_reg4", in_chans=1).save(tmp_path / "start")
    result = train(changed(SUPERVISED, model={"start": str(tmp_path / "start")}), tmp_path / "run")
    model = ModelBundle.load(tmp_path / "run" / "model").build()
    assert model.patch_embed.proj.in_channels == 1
    assert result is not None
    random_bundle("vit_nano_reg4", in_chans=4).save(tmp_path / "four")
    with pytest.raises(RecipeError, match="takes images of 4 channels, but those of digits have 3"):
        train(changed(SUPERVISED, model={"start": str(tmp_path / "four")}), tmp_path / "other")
    assert not (tmp_path / "other" / "model").exists()
