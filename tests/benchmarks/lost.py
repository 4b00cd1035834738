"""Print what LOST's box takes beside the matrix of similarities alone. Run by hand."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from vitreg_hub.evaluation.lost import lost_box

SIDES = (37, 60)
"""Patches a side: 518 pixels by 14, and 960 by 16."""
WIDTHS = (384, 768)
ROUNDS = 15


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of all threads, since other processes of the machine wait for it, too."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """One row for each grid and width; the two take turns."""
    torch.set_num_threads(1)  # threads that wait for work would count, too
    print("| grid | width | similarities, CPU s | box, CPU s | ratio |")
    print("|---|---|---|---|---|")
    for side in SIDES:
        for width in WIDTHS:
            features = torch.randn(side * side, width, generator=torch.Generator().manual_seed(0))
            features[:, 0] += 10  # most patches are alike, as in pictures
            where = {"grid": (side, side), "patch_size": 14, "image_size": (side * 14, side * 14)}
            seconds: dict[str, list[float]] = {"alone": [], "box": []}
            for _ in range(ROUNDS + 1):
                seconds["alone"].append(cpu_seconds(partial(torch.matmul, features, features.T)))
                seconds["box"].append(cpu_seconds(partial(lost_box, features, **where)))
            alone, box = (statistics.median(values[1:]) for values in seconds.values())
            print(f"| {side} x {side} | {width} | {alone:.4f} | {box:.4f} | {box / alone:.2f} |")


if __name__ == "__main__":
    main()
