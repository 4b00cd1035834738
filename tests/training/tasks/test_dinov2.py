"""Two steps of DINOv2 against the ones recorded from the official `SSLMetaArch.forward_backward`."""

import json
from copy import deepcopy

import pytest
import timm
import torch
from checkpoints import GOLDEN
from safetensors.torch import load_file

from vitreg_hub.network.positions import PositionRule, follow
from vitreg_hub.training.distributed.parallel import average_into
from vitreg_hub.training.optim.optimizer import build_optimizer, clip_gradients
from vitreg_hub.training.recipes.settings import OptimSettings
from vitreg_hub.training.schedules import Span
from vitreg_hub.training.tasks.base import Batch, RunFacts
from vitreg_hub.training.tasks.dinov2.settings import DinoV2, Head
from vitreg_hub.training.tasks.dinov2.task import DinoV2Task

CASE = GOLDEN / "dinov2_ssl_train_step"
META = json.loads((CASE / "meta.json").read_text())
VIT = META["vit"] | {"init_values": 1e-5}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
STEPS = 2


def recorded(file: str, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = load_file(CASE / f"{file}.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def backbone(registers: int = 0) -> timm.models.VisionTransformer:
    """The recorded network: its class token has a position of its own."""
    model = timm.create_model(
        "vit_small_patch14_dinov2", **VIT, reg_tokens=registers, dynamic_img_size=True, num_classes=0
    )
    follow(model, PositionRule(antialias=False, offset=0.1))
    return model.train()


def official_task(**settings) -> DinoV2Task:
    head = Head(prototypes=40, bottleneck=12, hidden=24)
    settings = DinoV2(dino_head=head, centering="running_mean", **settings)
    task = DinoV2Task(
        settings,
        backbone(),
        RunFacts(span=Span(epoch_steps=STEPS, total_steps=STEPS), batch_size=META["batch_images"], seed=0),
    )
    task.network.load_state_dict(shaped(recorded("checkpoint", "student.")))
    teacher = shaped(recorded("checkpoint", "teacher."))
    del teacher["backbone.mask_token"]  # it sees all patches
    task.teacher.load_state_dict(teacher)
    for name, file in (("dino", "dino_loss.center"), ("ibot", "ibot_patch_loss.center")):
        center = recorded("checkpoint")[file].flatten()
        task.frozen["centers"][name].center.copy_(center)
        task.frozen["centers"][name].next_center.copy_(center)
    return task


def shaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("ibot_head")}


def crops(step: int) -> tuple[torch.Tensor, ...]:
    inputs = recorded("inputs", f"step{step}.")
    batch = META["batch_images"]
    return (*inputs["collated_global_crops"].split(batch), *inputs["collated_local_crops"].split(batch))


def masks(step: int) -> torch.Tensor:
    return recorded("inputs", f"step{step}.")["collated_masks"].bool()


def test_two_steps_are_the_official_ones():
    task = official_task()
    settings = OptimSettings(
        lr=1.0,
        decay_rule="dinov2",
        layer_decay=META["layerwise_decay"],
        patch_embed_lr=META["patch_embed_lr_mult"],
        clip=META["clip_grad"],
        clip_per_module=True,
    )
    optimizer = build_optimizer(task.network, settings, depth=VIT["depth"])
    for step in range(STEPS):
        for group in optimizer.param_groups:
            lr = META["last_layer_lr" if group["last_layer"] else "lr"][step]
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], META["weight_decay"][step] * group["wd_scale"]
        output = task.losses(task.network, crops(step), masks(step), temperature=META["teacher_temp"][step])
        expected = recorded("expected", f"step{step}.")
        terms = {name.removeprefix("loss_"): value for name, value in output.metrics.items()}
        # what upstream logs is half of the term (meta.json)
        torch.testing.assert_close(terms["ibot"] / 2, expected["ibot_loss"], **TOLERANCE)
        torch.testing.assert_close(terms["koleo"] / 2, expected["koleo_loss"], **TOLERANCE)
        torch.testing.assert_close(terms["dino_local"], expected["dino_local_crops_loss"], **TOLERANCE)
        torch.testing.assert_close(terms["dino_global"], expected["dino_global_crops_loss"], **TOLERANCE)
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            for name, parameter in task.network.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[f"grad.{name}"], **TOLERANCE)
        for child, name in ((task.network.backbone, "backbone"), (task.network.dino_head, "dino_head")):
            norm = torch.nn.utils.get_total_norm([p.grad for p in child.parameters()])
            torch.testing.assert_close(norm, expected[f"grad_norm_before_clip.{name}"], atol=1e-5, rtol=1e-4)
        clip_gradients(task.network, settings)
        optimizer.step()
        average_into(task.teacher, task.network, META["ema_momentum"][step])
    final = recorded("expected", "final.student.")
    for name, parameter in task.network.named_parameters():
        kept = slice(None)
        if name.endswith(
            "qkv.bias"
        ):  # softmax ignores a key's bias: its gradient is noise, of which Adam takes the sign
            width = VIT["embed_dim"]
            kept = [*range(width), *range(2 * width, 3 * width)]
        torch.testing.assert_close(parameter.detach()[kept], final[name][kept], **TOLERANCE)
    for name, tensor in recorded("expected", "final.teacher.").items():
        torch.testing.assert_close(task.teacher.state_dict()[name], tensor, **TOLERANCE)


def test_centers_move_as_recorded():
    task = official_task()
    for step in range(STEPS):
        task.losses(task.network, crops(step), masks(step), temperature=META["teacher_temp"][step])
        expected = recorded("expected", f"step{step}.")
        if step == 0:  # after it the student moves
            torch.testing.assert_close(
                task.frozen["centers"]["dino"].center, expected["dino_center_state"].flatten(), **TOLERANCE
            )
            torch.testing.assert_close(
                task.frozen["centers"]["ibot"].center, expected["ibot_center_state"].flatten(), **TOLERANCE
            )


@pytest.mark.parametrize("registers", [1, 4])
def test_registers_take_no_loss_but_learn(registers):
    model = backbone(registers)
    head = Head(prototypes=16, bottleneck=8, hidden=16)
    task = DinoV2Task(
        DinoV2(dino_head=head, ibot_head=head),
        model,
        RunFacts(span=Span(epoch_steps=1, total_steps=1), batch_size=4, seed=0),
    )
    seen = task.network(torch.cat(crops(0)[:2]), torch.arange(5), masks=masks(0))
    assert seen["patch_logits"].shape == (5, 16)
    output = task.losses(task.network, crops(0), masks(0), temperature=0.05)
    output.loss.backward()
    assert model.reg_token.grad.abs().sum() > 0
    assert set(output.metrics) == {"loss_dino_global", "loss_dino_local", "loss_ibot", "loss_koleo"}


def test_hidden_patches_change_nothing_else():
    task = official_task()
    images, hidden = torch.cat(crops(0)[:2]), masks(0)
    changed = images.clone()
    patch = META["vit"]["patch_size"]
    rows = hidden.view(len(images), images.shape[2] // patch, -1)
    pixels = rows.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None].expand_as(images)
    changed[pixels] += 1
    with torch.no_grad():
        index = torch.arange(3)
        before = task.network(images, index, masks=hidden)
        after = task.network(changed, index, masks=hidden)
        unmasked = task.network(changed, index)
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, after[name], atol=0, rtol=0)
    assert not torch.allclose(before["global_logits"], unmasked["global_logits"], atol=1e-4)
    assert not task.network.backbone.patch_embed._forward_hooks


def test_each_image_has_masks_of_its_own_wherever_it_is():
    task = official_task()

    def drawn(positions: list[int], step: int = 5) -> torch.Tensor:
        images = torch.zeros(len(positions), 3, 32, 32)
        batch = Batch(step=step, positions=torch.tensor(positions), names=(), crops=(images, images))
        return task._masks(batch)

    task.batch_size, everyone = 64, list(range(64))
    whole = drawn(everyone)
    assert 60 <= (whole.sum(1) > 0).sum() <= 64  # of 128 global crops; the smallest masks may find no place
    masked = whole[whole.sum(1) > 0]
    assert len(masked.unique(dim=0)) > 50
    mine = [3, 17, 40]
    assert torch.equal(drawn(mine), whole[[*mine, *(64 + position for position in mine)]])
    assert not torch.equal(drawn(everyone, step=6), whole)


def test_parameters_of_no_module_are_clipped_too():
    network = torch.nn.Linear(2, 2)
    network.child = torch.nn.Linear(3, 3)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    largest = clip_gradients(network, OptimSettings(lr=1.0, clip=1.0, clip_per_module=True))
    assert largest == pytest.approx(100 * 12**0.5)
    for part in ([network.weight, network.bias], list(network.child.parameters())):
        assert torch.nn.utils.get_total_norm([p.grad for p in part]) == pytest.approx(1.0, rel=1e-4)


def test_equal_weights_stay_equal_in_the_average():
    source = official_task().network
    target = deepcopy(source)
    for momentum in (0.1, 0.5, 0.9, 0.996):
        average_into(target, source, momentum)
    assert all(torch.equal(target.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
