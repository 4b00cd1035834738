"""Print what the loop adds to the bare step of the same model: forward, backward, clipping, optimiser. Run by hand."""

import argparse
import tempfile
import threading
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
from interleaved import medians

from vitreg_hub.training.optim.optimizer import clip_gradients
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.run.assembly import make_accelerator
from vitreg_hub.training.run.trainer import Trainer, on_device
from vitreg_hub.training.watch.logbook import Logbook

MODELS = (("vit_nano_reg4", 32, 32), ("vit_small_reg4", 224, 8), ("vit_large_reg4", 224, 4))
"""Architecture, side of the images, images of a step; on a GPU eight times as many."""
DIFFERENT_BATCHES = 4


def recipe_for(task: str, arch: str, side: int, batch_size: int, *, compile: bool, on_gpu: bool) -> Recipe:
    """One of the small recipes with another network."""
    recipe = RECIPES[f"{task}_digits"]()
    augment = replace(recipe.augment, local_size=side * 3 // 7 // 14 * 14 or 16) if task == "dinov2" else recipe.augment
    return replace(
        recipe,
        model=replace(recipe.model, arch=arch, img_size=side),
        augment=augment,
        optim=replace(recipe.optim, opt="adamw"),
        scale=replace(recipe.scale, precision="bf16" if on_gpu else "no", compile=compile),
        watch=replace(recipe.watch, log_every=10),
        batch_size=batch_size,
    )


def compare(recipe: Recipe, *, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of so many steps of the loop, and of the same ones with nothing around them."""
    trainer = Trainer(recipe, make_accelerator(recipe))
    task, device, optimizer = trainer.parts.task, trainer.accelerator.device, trainer.optimizer
    batches = list(trainer.parts.loader.batches(0, DIFFERENT_BATCHES))
    ours, theirs = cycle(batches), cycle(batches)

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        logbook = Logbook(
            folder=folder,
            accelerator=trainer.accelerator,
            total_steps=10**9,
            throughput=trainer.throughput,
        )

        def loop() -> None:
            for step in range(steps):
                metrics, _ = trainer.do_step(step, [next(ours)], threading.Event(), Path(folder))
                logbook.step_done()
                if step % recipe.watch.log_every == 0:
                    logbook.log(step, metrics)
            finish()

        def bare() -> None:
            for _ in range(steps):
                with trainer.accelerator.autocast():
                    loss = task.training_step(trainer.network, on_device(next(theirs), device)).loss
                loss.backward()
                clip_gradients(task.network, recipe.optim)
                optimizer.step()
                optimizer.zero_grad()
                task.after_step(0)
            finish()

        with logbook:
            return medians({"loop": loop, "bare step": bare}, rounds=rounds, warmup=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="of the smallest model; fewer of the larger ones")
    parser.add_argument("--models", type=int, default=len(MODELS), help="how many, smallest first")
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    print("| model | task | compiled | images/s | loop / bare step |\n|---|---|---|---|---|")
    for number, (arch, side, images) in enumerate(MODELS[: given.models]):
        for task in ("supervised", "dinov2"):
            for compile in (False, True) if on_gpu else (False,):
                batch_size = images * (8 if on_gpu else 1)
                steps = given.steps if on_gpu or not number else 1
                recipe = recipe_for(task, arch, side, batch_size, compile=compile, on_gpu=on_gpu)
                seconds = compare(recipe, rounds=given.rounds, steps=steps)
                speed, ratio = steps * batch_size / seconds["loop"], seconds["loop"] / seconds["bare step"]
                print(
                    f"| {arch}, {side} px x {batch_size} | {task} | {compile} | {speed:.1f} | {ratio:.3f} |", flush=True
                )
