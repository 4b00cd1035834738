"""Print what the analysis adds to a bare forward pass, and what memory it takes. Run by hand."""

import argparse
import subprocess
import sys

import timm
import torch
from interleaved import medians
from torch import Tensor, nn

import vitreg_hub  # noqa: F401  (registers the models)
from vitreg_hub.analysis.meters.norms import NormMeter
from vitreg_hub.analysis.telemetry import telemetry
from vitreg_hub.tokens import observe

MODELS = (("vit_nano_reg4", 32, 64), ("vit_small_reg4", 224, 8), ("vit_large_reg4", 224, 8))
"""Architecture, side of the images, images."""
MANY_IMAGES = """
import resource, sys, datasets, numpy as np, timm
import vitreg_hub
from PIL import Image
from vitreg_hub.analysis.measures import analyze

def images():
    rng = np.random.default_rng(0)
    for i in range(int(sys.argv[1])):
        yield {"image": Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), "label": i % 10}

features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(num_classes=10))
stream = datasets.IterableDataset.from_generator(images, features=features)
report = analyze("vit_nano_reg4", stream, batch_size=64)
assert report.images.num_images == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """The bare forward pass."""
    model.forward_features(images)


def norms(model: nn.Module, images: Tensor) -> None:
    """Norms of every token of every block, and their histograms."""
    NormMeter().update(observe(model, images, norms=True))


def speed(name: str, *, side: int, num_images: int, rounds: int, device: str, dtype: torch.dtype) -> str:
    """One model, images of so many pixels a side."""
    model = timm.create_model(name, img_size=side).eval().to(device, dtype)
    images = torch.randn(num_images, 3, side, side, device=device, dtype=dtype)

    def finished(call):
        def run() -> None:
            call(model, images)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {"bare forward": forward, "norms": norms, "telemetry": telemetry}
    seconds = medians({name: finished(call) for name, call in calls.items()}, rounds=rounds, warmup=2)
    rows = [f"| {name}, {num_images} images of {side} pixels, {device} | seconds | / bare forward |", "|---|---|---|"]
    rows += [f"| {what} | {value:.4f} | {value / seconds['bare forward']:.3f} |" for what, value in seconds.items()]
    return "\n".join(rows)


def memory(numbers: tuple[int, ...]) -> str:
    """Whole analyses of vit_nano_reg4 over streams of different length, each in a process of its own."""
    rows = ["| whole analysis of a stream | peak MB |", "|---|---|"]
    for number in numbers:
        done = subprocess.run(
            [sys.executable, "-c", MANY_IMAGES, str(number)], check=True, capture_output=True, text=True
        )
        rows.append(f"| {number:,} images | {done.stdout.strip()} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", nargs="*", type=int, default=[1_000, 10_000])
    given = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    for name, side, num_images in MODELS:
        table = speed(
            name,
            side=side,
            num_images=num_images,
            rounds=given.rounds,
            device="cuda" if on_gpu else "cpu",
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        print(table, end="\n\n")
    print(memory(tuple(given.memory)))
