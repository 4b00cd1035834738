"""Small runs of every task, in this process or in several; the latter call this file."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vitreg_hub.training import loop
from vitreg_hub.training.loop import Instruments
from vitreg_hub.training.recipes.settings import (
    CropAugment,
    DataSettings,
    ModelSettings,
    MultiCrop,
    OptimSettings,
    Recipe,
    ScaleSettings,
    WatchSettings,
)
from vitreg_hub.training.schedules import Span
from vitreg_hub.training.tasks.base import RunFacts
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2, Head
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.supervised.settings import Supervised

NO_PICTURES = Instruments(draw_curves=lambda *_, **__: None, draw_first_batch=lambda *_, **__: None)
"""Pictures take longer than a tiny run; other tests look at them."""
train = partial(loop.train, instruments=NO_PICTURES)

STEPS = 4
RUN = RunFacts(span=Span(epoch_steps=1, total_steps=1), batch_size=1, seed=0)
"""For tasks whose run matters little."""
HEAD = Head(prototypes=32, bottleneck=16, hidden=32)
DIGITS = DataSettings(train="digits")
CROPS = CropAugment(scale=(0.8, 1.0))

SUPERVISED = Recipe(
    name="tiny_supervised",
    model=ModelSettings(arch="vit_nano_reg2", layer_scale=0.1),
    task=Supervised(mixup=0.8, cutmix=1.0, ema=0.9),
    data=DIGITS,
    augment=CROPS,
    optim=OptimSettings(lr=1e-3, warmup_epochs=1, clip=1.0),
    watch=WatchSettings(log_every=1, save_every=2, eval_images=32, artifact_images=8),
    batch_size=8,
    epochs=STEPS / 2,
    epoch_steps=2,
)
TINY = {
    "supervised": SUPERVISED,
    "dinov2": replace(
        SUPERVISED,
        name="tiny_dinov2",
        task=DinoV2(
            dino_head=HEAD,
            ibot_head=HEAD,
            momentum=(0.9, 1.0),
            teacher_temperature_epochs=1,
            freeze_last_layer_epochs=0.5,
        ),
        augment=MultiCrop(local_size=16, num_local=2),
        optim=OptimSettings(
            lr=1e-3,
            weight_decay=0.04,
            weight_decay_end=0.4,
            decay_rule="dinov2",
            layer_decay=0.9,
            patch_embed_lr=0.2,
            clip=3.0,
            clip_per_module=True,
        ),
    ),
    "dinov2_running_mean": None,  # below
    "contrastive": replace(
        SUPERVISED,
        name="tiny_contrastive",
        task=Contrastive(text_width=32, text_heads=2, text_layers=2, context_length=16, embed_dim=24),
        data=DataSettings(train="scenes"),
        optim=OptimSettings(lr=1e-3, betas=(0.9, 0.98), eps=1e-6, decay_rule="openclip", weight_decay=0.2),
    ),
    "distill": replace(SUPERVISED, name="tiny_distill", task=Distill(teacher="vit_nano_reg4.digits")),
}
LAMB = replace(SUPERVISED, name="tiny_lamb", optim=replace(SUPERVISED.optim, opt="lamb"))
"""DeiT-III's optimiser, which counts its steps by group."""
TINY["dinov2_running_mean"] = replace(
    TINY["dinov2"],
    name="tiny_dinov2_running_mean",
    task=replace(TINY["dinov2"].task, centering="running_mean", ibot_head=None),
)


def with_scale(recipe: Recipe, **scale: Any) -> Recipe:
    return replace(recipe, scale=ScaleSettings(**scale))


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run wrote down."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def in_processes(count: int, names: Iterable[str], out: Path, *, python: Path, **scale: Any) -> None:
    """Train small recipes one after the other in several processes on the CPU, each in a folder of its name.

    The first one draws its pictures, too.
    """
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    command = [python, *launch, __file__, ",".join(names), str(out), json.dumps(scale)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    names, out, scale = sys.argv[1:]
    for number, name in enumerate(names.split(",")):
        run = train if number else loop.train
        run(with_scale(TINY[name], **json.loads(scale)), Path(out, name))
    torch.distributed.destroy_process_group()
