"""The distillation task against the official losses, and against sums that are written out here."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from checkpoints import GOLDEN
from models import random_bundle, randomised
from safetensors.torch import load_file
from torch import Tensor, nn
from training_runs import RUN

from vitreg_hub.errors import DataError, RecipeError, UnknownArchError
from vitreg_hub.tokens import Tokens
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.distill.task import DistillTask, cosine, squared

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
WIDE = TINY | {"embed_dim": 48}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Callable[..., Path]:
    """Bundles of teachers with three registers fewer than the student."""
    root = tmp_path_factory.mktemp("teachers")

    def save(name: str, arch: str = "vit_nano_reg1", **shape) -> Path:
        if not (root / name).exists():
            random_bundle(arch, num_classes=3, **shape).save(root / name)
        return root / name

    return save


def task_of(teacher: Path | str, *, arch: str = "vit_nano_reg4", seed: int = 1, **weights) -> DistillTask:
    torch.manual_seed(seed)
    backbone = randomised(timm.create_model(arch, num_classes=0, **TINY), seed=seed)
    return DistillTask(Distill(teacher=str(teacher), **weights), backbone, RUN)


def batch_of(images: Tensor | None = None) -> Batch:
    images = torch.randn(3, 3, 32, 32) if images is None else images
    return Batch(step=0, positions=torch.arange(3), names=("a", "b", "c"), crops=(images,))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_losses_are_those_of_ph_reg():
    given = load_file(GOLDEN / "phreg_ops" / "inputs.safetensors")
    recorded = load_file(GOLDEN / "phreg_ops" / "expected.safetensors")
    found = 1 - cosine(given["loss_a"], given["loss_b"]).mean(), squared(given["loss_a"], given["loss_b"])
    torch.testing.assert_close(found[0], recorded["cosine_similarity_loss"], rtol=1e-6, atol=0)
    # the recorded number is 0.2 of the mean
    torch.testing.assert_close(0.2 * found[1], recorded["mse_loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [TINY, WIDE], ids=["same width", "projected"])
def test_loss_is_the_sum_written_out(teachers, shape):
    folder = teachers(f"{shape['embed_dim']}", **shape)
    task = task_of(folder, cosine_weight=0.7, mse_weight=0.3, class_weight=0.2)
    batch = batch_of()
    output = task.training_step(task.network, batch)

    teacher = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        wanted = teacher.forward_features(batch.crops[0])
    tokens = task.network.backbone.forward_features(batch.crops[0])
    if shape is WIDE:
        tokens = tokens @ task.network.projection.weight.T + task.network.projection.bias
    total = 0.0
    for image in range(3):
        for patch in range(16):
            ours, theirs = tokens[image, 1 + 4 + patch], wanted[image, 1 + 1 + patch]
            total += 0.7 * (1 - F.cosine_similarity(ours, theirs, dim=0)) / 48
            total += 0.3 * F.mse_loss(ours, theirs) / 48
        total += 0.2 * (1 - F.cosine_similarity(tokens[image, 0], wanted[image, 0], dim=0)) / 3
    torch.testing.assert_close(output.loss, total, rtol=1e-5, atol=0)
    assert output.metrics.keys() == {"cosine", "mse", "class"}
    assert not any(term.requires_grad for term in output.metrics.values())
    scores = task.scorer(task.network)(batch.crops[0], torch.full((3,), -1))["patch_cosine"]
    torch.testing.assert_close(1 - scores.mean(), output.metrics["cosine"], rtol=1e-5, atol=1e-6)
    expected = F.cosine_similarity(tokens[1, 5:], wanted[1, 2:], dim=-1).mean()
    torch.testing.assert_close(scores[1], expected.detach(), rtol=1e-5, atol=1e-6)


class AddedToOutputs(nn.Module):
    """The final norm, after which something is added to some tokens."""

    def __init__(self, norm: nn.Module, tokens: slice) -> None:
        super().__init__()
        self.norm, self.tokens = norm, tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).clone()
        x[:, self.tokens] += 5
        return x


@pytest.mark.parametrize(("tokens", "counts"), [(slice(1, 5), False), (slice(0, 1), False), (slice(5, 6), True)])
def test_only_patches_take_loss(teachers, tokens, counts):
    task, batch = task_of(teachers("32", **TINY)), batch_of()
    before = task.training_step(task.network, batch).loss
    task.network.backbone.norm = AddedToOutputs(task.network.backbone.norm, tokens)
    after = task.training_step(task.network, batch).loss
    assert (before != after) == counts


def test_teachers_registers_and_class_token_take_no_loss(teachers):
    task, batch = task_of(teachers("32", **TINY)), batch_of()
    before = task.training_step(task.network, batch).loss
    task.teacher.model.norm = AddedToOutputs(task.teacher.model.norm, slice(0, 2))
    assert task.training_step(task.network, batch).loss == before


def test_class_token_takes_loss_where_it_has_a_weight(teachers):
    task, batch = task_of(teachers("32", **TINY), class_weight=1.0), batch_of()
    before = task.training_step(task.network, batch).loss
    task.network.backbone.norm = AddedToOutputs(task.network.backbone.norm, slice(0, 1))
    assert task.training_step(task.network, batch).loss != before


@pytest.mark.parametrize("shape", [TINY, WIDE], ids=["same width", "projected"])
def test_a_few_steps_learn_and_leave_the_teacher(teachers, shape):
    task, batch = task_of(teachers(f"{shape['embed_dim']}", **shape)), batch_of()
    task.network.train()
    before = weights_of(task.teacher.model)
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=1e-2)
    scorer = task.scorer(task.network)
    start = scorer(batch.crops[0], torch.zeros(3))["patch_cosine"].mean()
    for step in range(15):
        loss = task.training_step(task.network, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step)
    end = scorer(batch.crops[0], torch.zeros(3))["patch_cosine"].mean()
    assert end > start + 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.teacher.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.teacher.model.parameters())
    assert not task.teacher.model.training
    assert not any(
        parameter is other for parameter in task.network.parameters() for other in task.teacher.model.parameters()
    )
    assert task.frozen == {}  # what is saved


def test_a_copy_without_new_registers_is_perfect(teachers):
    folder = teachers("32", **TINY)
    teacher = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    task = DistillTask(Distill(teacher=str(folder)), teacher, RUN)
    output = task.training_step(task.network, batch_of())
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert isinstance(task.network.projection, nn.Identity)


def test_teacher_sees_images_as_it_was_trained_to(tmp_path):
    """The student's images are normalised by ImageNet's numbers, the teacher's by CLIP's."""
    random_bundle("vit_base_reg0_clip", num_classes=0, img_size=32, **TINY).save(tmp_path / "clip")
    task = task_of(tmp_path / "clip")
    pixels = torch.rand(3, 3, 32, 32)
    cfg = task.network.backbone.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    teacher = timm.create_model(f"local-dir:{tmp_path / 'clip'}", pretrained=True).eval()
    own_mean, own_std = (torch.tensor(teacher.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert not torch.equal(mean, own_mean)
    with torch.no_grad():
        wanted = teacher.forward_features((pixels - own_mean) / own_std)[:, 1:]
    torch.testing.assert_close(task.teacher((pixels - mean) / std).patches, wanted, rtol=1e-4, atol=1e-5)


def test_teacher_of_transformers(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, num_register_tokens=2
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    processor = transformers.BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    processor.save_pretrained(tmp_path / "hf")
    task, images = task_of(tmp_path / "hf"), torch.randn(3, 3, 32, 32)
    mean, std = (torch.tensor(task.network.backbone.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = model((images * std + mean - 0.5) / 0.25).last_hidden_state[:, 3:]
    torch.testing.assert_close(task.teacher(images).patches, wanted, rtol=1e-4, atol=1e-5)
    task.training_step(task.network, batch_of(images)).loss.backward()
    assert task.network.projection.weight.grad.any()


def test_another_target_takes_the_place_of_the_teachers_tokens(teachers):
    task, batch, asked = task_of(teachers("32", **TINY)), batch_of(), []

    def target(teacher, batch: Batch) -> Tokens:
        asked.append(batch)
        return replace(teacher(batch.crops[0]), patches=torch.ones(3, 16, 32))

    other = DistillTask(task.settings, task.network.backbone, RUN, target=target)
    output = other.training_step(other.network, batch)
    patches = task.network.backbone.forward_features(batch.crops[0])[:, 5:]
    torch.testing.assert_close(output.metrics["mse"], (patches - 1).square().mean().detach(), rtol=1e-5, atol=0)
    assert asked == [batch]


def test_losses_are_computed_in_float32_under_autocast(teachers):
    task = task_of(teachers("32", **TINY))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.training_step(task.network, batch_of()).loss.dtype == torch.float32


def test_teachers_that_do_not_fit_are_refused(teachers):
    with pytest.raises(RecipeError, match="into 2x2 patches, the student into 4x4"):
        task_of(teachers("coarse", **(TINY | {"patch_size": 16})))
    with pytest.raises(RecipeError, match="has no weights"):
        task_of("vit_nano_reg16")
    with pytest.raises(DataError, match="32x32 pixels does not divide"):
        task_of(teachers("by 14", "vit_small_reg0", **(TINY | {"patch_size": 14, "img_size": 56})))
    with pytest.raises(UnknownArchError):
        task_of("no_such_model")


def test_teachers_of_other_channels_are_refused(teachers):
    folder = teachers("gray", in_chans=1, **TINY)
    with pytest.raises(RecipeError, match=r"task\.teacher takes 1 and the student takes 3 channels, but distillation"):
        task_of(folder)
