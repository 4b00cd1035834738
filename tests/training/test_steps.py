"""What one step of the loop does to the weights, and in which order, told from the weights themselves."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TINY, lines, train

from vitreg_hub.training.recipes.settings import OptimSettings
from vitreg_hub.training.run.assembly import make_accelerator
from vitreg_hub.training.run.folders import checkpoints
from vitreg_hub.training.run.trainer import Trainer

FIRST_STEP = 1.9
"""Of timm's "sgd", Nesterov's with momentum .9, in units of rate times gradient."""
SGD = OptimSettings(opt="sgd", betas=None, lr=0.1, weight_decay=0.0)


def plain(name: str, optim: OptimSettings = SGD, **task):
    """A run under plain gradient descent whose every state is kept."""
    recipe = TINY[name]
    watch = replace(recipe.watch, save_every=1, keep=9, artifact_images=0)
    return replace(recipe, optim=optim, watch=watch, task=replace(recipe.task, **task))


def states(run, file: str = "backbone") -> list[dict[str, torch.Tensor]]:
    """Weights after each step."""
    return [load_file(folder / "state" / f"{file}.safetensors") for folder in checkpoints(run)]


def distance(one, other) -> float:
    return sum((one[key] - other[key]).square().sum() for key in one).sqrt().item()


def start_of(recipe) -> dict[str, torch.Tensor]:
    return Trainer(recipe, make_accelerator(recipe)).parts.task.network.backbone.state_dict()


def test_rates_are_those_of_the_step(tmp_path):
    recipe = plain("supervised", replace(SGD, warmup_epochs=1, warmup_lr=0.0), ema=None, mixup=0.0, cutmix=0.0)
    train(recipe, tmp_path / "run")
    start, (first, second, *_) = start_of(recipe), states(tmp_path / "run")
    assert all(torch.equal(start[key], tensor) for key, tensor in first.items())  # a warm-up from 0
    assert distance(second, first) > 0
    assert [line["lr"] for line in lines(tmp_path / "run") if "lr" in line][:2] == [0.0, 0.1]


def test_gradients_are_clipped(tmp_path):
    """A step of plain descent is as long as the rate times the gradient's norm."""
    recipe = plain("supervised", replace(SGD, clip=1e-3), ema=None)
    train(recipe, tmp_path / "run")
    first = distance(states(tmp_path / "run")[0], start_of(recipe))
    assert first == pytest.approx(FIRST_STEP * 0.1 * 1e-3, rel=0.01)
    assert all(line["grad_norm"] > 1e-2 for line in lines(tmp_path / "run") if "grad_norm" in line)


def test_each_module_is_clipped_on_its_own(tmp_path):
    recipe = plain("dinov2", replace(SGD, clip=1e-3, clip_per_module=True), freeze_last_layer_epochs=0)
    train(recipe, tmp_path / "run")
    step = distance(states(tmp_path / "run")[0], start_of(recipe))
    assert step == pytest.approx(FIRST_STEP * 0.1 * 1e-3, rel=0.01)  # less, if the heads had taken part
    heads = states(tmp_path / "run", "heads")
    moved = {head: {k: v for k, v in heads[0].items() if k.startswith(head)} for head in ("dino_head", "ibot_head")}
    before = Trainer(recipe, make_accelerator(recipe)).parts.task.network.state_dict()
    for tensors in moved.values():
        assert distance(tensors, before) == pytest.approx(FIRST_STEP * 0.1 * 1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "file", "settings"),
    [("dinov2", "teacher", {"momentum": (0.0, 0.0)}), ("supervised", "ema", {"ema": 1e-9})],
)
def test_averages_follow_the_step_that_was_just_made(name, file, settings, tmp_path):
    train(plain(name, **settings), tmp_path / "run")
    for student, average in zip(states(tmp_path / "run"), states(tmp_path / "run", file), strict=True):
        for key, tensor in student.items():
            if key != "mask_token":
                torch.testing.assert_close(average[f"backbone.{key}"], tensor, atol=1e-7, rtol=1e-6)


def test_last_layers_are_held_and_decay_runs_over_the_run(tmp_path):
    optim = replace(TINY["dinov2"].optim, warmup_epochs=0)
    train(plain("dinov2", optim, freeze_last_layer_epochs=1), tmp_path / "run")  # two steps
    heads = states(tmp_path / "run", "heads")
    last, other = "dino_head.last_layer.weight_v", "dino_head.mlp.0.weight"
    assert torch.equal(heads[0][last], heads[1][last])
    assert not torch.equal(heads[0][other], heads[1][other])
    assert not torch.equal(heads[1][last], heads[2][last])
    decay = [line["weight_decay"] for line in lines(tmp_path / "run") if "weight_decay" in line]
    # half a cosine over four steps: 1 - cos(0, 45, 90, 135 degrees)
    assert decay == pytest.approx([0.04 + 0.18 * (1 - cos) for cos in (1, 0.5**0.5, 0, -(0.5**0.5))])


def test_a_teacher_drops_nothing_and_gets_no_gradients(tmp_path):
    recipe = replace(TINY["dinov2"], model=replace(TINY["dinov2"].model, drop_path=0.5))
    trainer = Trainer(recipe, make_accelerator(recipe))
    teacher = trainer.parts.task.teacher
    assert not any(module.training for module in teacher.modules())
    assert trainer.network.training
    images = next(trainer.parts.loader.batches(0, 1)).crops[0]
    with torch.no_grad():
        first, second = (teacher(images, torch.arange(2))["class_tokens"] for _ in range(2))
    assert torch.equal(first, second)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
