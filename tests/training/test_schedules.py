"""Schedules and groups of parameters, against those of the official code, timm and open_clip."""

import json
import re
from collections.abc import Callable
from functools import partial

import open_clip
import pytest
import timm
import torch
from checkpoints import GOLDEN
from safetensors.torch import load_file
from timm.optim import param_groups_weight_decay
from torch import nn

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.optim.optimizer import Rates
from vitreg_hub.training.optim.param_groups import param_groups
from vitreg_hub.training.schedules import CosineSchedule, linear_then_constant
from vitreg_hub.training.tasks.dinov2.head import DinoHead
from vitreg_hub.training.tasks.dinov2.settings import Head

SCHEDULES = json.loads((GOLDEN / "schedules/meta.json").read_text())
GROUPS = json.loads((GOLDEN / "param_groups/meta.json").read_text())["result"]
HEAD = Head(prototypes=5, hidden=6, bottleneck=3)
OURS = {
    "base_value": "base",
    "final_value": "final",
    "total_iters": "total",
    "warmup_iters": "warmup",
    "start_warmup_value": "warmup_start",
    "freeze_iters": "freeze",
}


def expected(name: str) -> list[float]:
    return load_file(GOLDEN / "schedules/expected.safetensors")[name].tolist()


def course(schedule: Callable[[int], float], num_steps: int) -> list[float]:
    return [schedule(step) for step in range(num_steps)]


@pytest.mark.parametrize("name", SCHEDULES["constructor"])
def test_cosine_schedule_is_the_official_one(name):
    schedule = CosineSchedule(**{OURS[k]: v for k, v in SCHEDULES["constructor"][name].items()})
    steps = expected(name)
    assert course(schedule, len(steps)) == pytest.approx(steps, rel=1e-12, abs=1e-18)
    assert [schedule(len(steps)), schedule(10 * len(steps))] == SCHEDULES["value_beyond_end"][name]


def last_layer_lr(rates: Rates, step: int) -> float:
    group = {"params": [nn.Parameter(torch.zeros(1))], "role": "head", "last_layer": True, "lr_scale": 1, "wd_scale": 1}
    optimizer = torch.optim.SGD([group])
    rates.apply(optimizer, step)
    return optimizer.param_groups[0]["lr"]


def test_schedules_of_a_training_run_are_the_official_ones():
    config = SCHEDULES["build_schedulers_cfg"]
    optim, teacher, epoch = config["optim"], config["teacher"], config["train"]["OFFICIAL_EPOCH_LENGTH"]
    total = optim["epochs"] * epoch
    rate = {
        "base": optim["lr"],
        "final": optim["min_lr"],
        "total": total,
        "warmup": optim["warmup_epochs"] * epoch,
    }
    schedules = {
        "lr": CosineSchedule(**rate),
        "wd": CosineSchedule(base=optim["weight_decay"], final=optim["weight_decay_end"], total=total),
        "momentum": CosineSchedule(
            base=teacher["momentum_teacher"], final=teacher["final_momentum_teacher"], total=total
        ),
        "teacher_temp": linear_then_constant(
            teacher["teacher_temp"],
            warmup=teacher["warmup_teacher_temp_epochs"] * epoch,
            start=teacher["warmup_teacher_temp"],
        ),
    }
    rates = Rates(
        lr=schedules["lr"],
        weight_decay=schedules["wd"],
        hold={"last_layer": optim["freeze_last_layer_epochs"] * epoch},
    )
    schedules["last_layer_lr"] = partial(last_layer_lr, rates)
    for name, schedule in schedules.items():
        steps = expected(f"build_schedulers.{name}")
        assert course(schedule, total) == pytest.approx(steps, rel=1e-12, abs=1e-18), name


def test_warm_up_of_one_step_has_its_start():
    schedule = CosineSchedule(base=1.0, final=0.0, total=3, warmup=1, warmup_start=0.25)
    assert course(schedule, 2) == [0.25, 1.0]


def test_no_warm_up_is_constant():
    assert course(linear_then_constant(0.07, warmup=0, start=0.04), 3) == [0.07] * 3


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(RecipeError, match=r"10 steps .* 12 steps"):
        CosineSchedule(base=1.0, final=0.0, total=10, warmup=8, freeze=4)


def our_name(official: str) -> str:
    name = official.replace("register_tokens", "reg_token")
    return re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)  # chunks, whose blocks keep their numbers


def settings_of(groups: list[dict]) -> dict[str, tuple]:
    return {name: (g["lr_scale"], g["wd_scale"], g["last_layer"]) for g in groups for name in g["names"]}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", [name for name in GROUPS if name != "dino_head"])
def test_groups_of_a_backbone_are_the_official_ones(case, wrapped):
    prefix = "backbone." if wrapped else ""
    recorded = {prefix + our_name(name): tuple(values) for name, values in GROUPS[case]["groups"].items()}
    named = [(name, nn.Parameter(torch.empty(1))) for name in recorded]
    groups = param_groups(named, depth=4, rule="dinov2", layer_decay=0.9, patch_embed_lr=0.2)
    assert settings_of(groups) == recorded
    assert len(groups) == GROUPS[case]["n_fused"]
    assert {group["role"] for group in groups} == {"backbone"}
    assert [p for group in groups for p in group["params"]] == [dict(named)[n] for g in groups for n in g["names"]]


@pytest.mark.parametrize("frozen_backbone", [False, True])
def test_groups_of_a_head_are_the_official_ones(frozen_backbone):
    network = nn.ModuleDict({"backbone": nn.Linear(2, 2), "dino_head": DinoHead(4, HEAD)})
    network["backbone"].requires_grad_(not frozen_backbone)
    groups = param_groups(network.named_parameters(), depth=4, rule="dinov2", layer_decay=0.9)
    groups = [group for group in groups if group["role"] == "head"]
    recorded = {f"dino_head.{name}": tuple(values) for name, values in GROUPS["dino_head"]["groups"].items()}
    assert settings_of(groups) == recorded
    assert len(groups) == GROUPS["dino_head"]["n_fused"]


def tiny_vit(**options) -> timm.models.VisionTransformer:
    return timm.create_model(
        "vit_small_patch14_reg4_dinov2", embed_dim=16, depth=3, num_heads=2, img_size=28, num_classes=5, **options
    )


def undecayed(groups: list[dict], model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for g in groups if g.get("wd_scale", g.get("weight_decay")) == 0 for p in g["params"]}


def test_decay_of_timm_is_timms():
    model = tiny_vit(class_token=True, qk_norm=True)
    model.blocks[0].requires_grad_(False)
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    ours = param_groups(model.named_parameters(), depth=3, rule="timm")
    assert undecayed(ours, model) == undecayed(theirs, model)
    assert {"reg_token", "cls_token", "pos_embed", "norm.weight"} < undecayed(ours, model)
    assert {id(p) for g in ours for p in g["params"]} == {id(p) for g in theirs for p in g["params"]}


def test_decay_of_openclip_is_openclips():
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 28, "patch_size": 14, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        init_logit_bias=-10.0,
    )
    theirs = param_groups_weight_decay(model, 0.2, no_weight_decay_list=model.no_weight_decay())
    ours = param_groups(model.named_parameters(), depth=1, rule="openclip")
    assert undecayed(ours, model) == undecayed(theirs, model)
    assert {"logit_scale", "positional_embedding", "visual.class_embedding"} < undecayed(ours, model)


def test_decay_of_openclip_spares_our_tower():
    model = nn.ModuleDict({"backbone": tiny_vit()})
    spared = {"cls_token", "reg_token", "pos_embed", "norm.weight", "patch_embed.proj.bias"}
    found = undecayed(param_groups(model.named_parameters(), depth=3, rule="openclip"), model)
    assert {f"backbone.{name}" for name in spared} < found
    assert "backbone.patch_embed.proj.weight" not in found


def test_classifier_is_a_head_and_keeps_its_rate():
    groups = param_groups(tiny_vit().named_parameters(), depth=3, rule="timm", layer_decay=0.5, patch_embed_lr=0.2)
    roles = {name: group["role"] for group in groups for name in group["names"]}
    assert {name for name, role in roles.items() if role == "head"} == {"head.weight", "head.bias"}
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["head.weight"] == scales["norm.weight"] == 1
    assert scales["blocks.2.norm1.bias"] == 0.5
    assert scales["reg_token"] == 0.5**4
    assert scales["patch_embed.proj.weight"] == 0.5**4 * 0.2


def test_optimisers_take_the_groups():
    network = nn.ModuleDict({"backbone": tiny_vit(), "dino_head": DinoHead(16, HEAD)})
    groups = param_groups(network.named_parameters(), depth=3, rule="dinov2", layer_decay=0.9)
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    kept = [{k: g[k] for k in ("names", "lr_scale", "wd_scale", "last_layer", "role")} for g in optimiser.param_groups]
    assert kept == [{k: v for k, v in group.items() if k in kept[0]} for group in groups]
    optimiser.load_state_dict(optimiser.state_dict())
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
