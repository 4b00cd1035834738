"""Pictures with masks and depths for tests, and a network whose patches hold just their colours."""

from dataclasses import dataclass

import numpy as np
import timm
import torch
from models import TINY, randomised
from PIL import Image
from torch import nn

MEAN = STD = (0.5, 0.5, 0.5)
COLOURS = np.array([[230, 40, 40], [40, 230, 40], [40, 40, 230], [230, 230, 40]], dtype=np.uint8)
PATCH = 16


@dataclass(frozen=True, kw_only=True)
class Annotated:
    name: str
    image: Image.Image
    mask: np.ndarray | None = None
    depth: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    pictures: tuple[Annotated, ...]
    class_names: tuple[str, ...] | None = ("red", "green", "blue", "yellow")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Annotated:
        return self.pictures[index]


def patches_of_colour(number: int = 24, *, grid: tuple[int, int] = (4, 4), seed: int = 0) -> Source:
    """Pictures of coloured patches: the colour is the class, and each class has a depth of its own."""
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(number):
        classes = rng.integers(len(COLOURS), size=grid)
        mask = classes.repeat(PATCH, axis=0).repeat(PATCH, axis=1).astype(np.int64)
        depth = np.array([1.0, 2.0, 4.0, 8.0], dtype=np.float32)[mask]
        image = Image.fromarray(COLOURS[mask])
        pictures.append(Annotated(name=f"picture {index}", image=image, mask=mask, depth=depth))
    return Source(pictures=tuple(pictures))


def colour_reader(*, img_size: int = 64, **settings) -> nn.Module:
    """A network whose blocks add next to nothing, so that its patches hold what they look like."""
    settings = TINY | {"img_size": img_size, "num_classes": 0} | settings
    vit = randomised(timm.create_model("vit_tiny_reg2_plain", **settings))
    with torch.no_grad():
        vit.pos_embed.mul_(0)
        for layer in vit.blocks:
            layer.attn.proj.weight.mul_(1e-3)
            layer.mlp.fc2.weight.mul_(1e-3)
    return vit
