"""A ViT with outliers at known places, from a known block on, that hold the image's class and nothing local."""

from dataclasses import dataclass

import datasets
import timm
import torch
from models import TINY, randomised
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn

NUM_CLASSES = 4
GRID = 4
PATCH = 16


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A model and images.

    Attributes:
        model: Tells an image by its corner pixel, and puts its outliers where they belong.
        data: Images of 4 x 4 coloured patches, and labels that nothing in them tells.
        pixels: [N, 3, 64, 64] what the model sees of them.
        outliers: [N, 16] where they are.
    """

    model: nn.Module
    data: datasets.Dataset
    pixels: Tensor
    outliers: Tensor


class _Planting(nn.Module):
    """A block after which chosen patches hold something else."""

    def __init__(self, block: nn.Module, vit: VisionTransformer, tokens: Tensor) -> None:
        super().__init__()
        self.block, self.attn = block, block.attn
        self._vit = (vit,)  # in a tuple, so that it is no child
        self._tokens = tokens  # [N, P, D], zero where nothing is planted

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = self.block(x, **kwargs)
        (vit,) = self._vit
        tokens = self._tokens[vit.numbers].to(x)
        patches = x[:, vit.num_prefix_tokens :]
        patches = torch.where(tokens.norm(dim=-1, keepdim=True) > 0, tokens, patches)
        return torch.cat([x[:, : vit.num_prefix_tokens], patches], dim=1)


class _Numbered(VisionTransformer):
    """Remembers which images it is seeing: their corner pixels hold their numbers."""

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        red, green = ((x[:, :2, 0, 0].float() / 2 + 0.5) * 255).round().long().cpu().unbind(1)
        self.numbers = red + 256 * green
        return super().forward_features(x, *args, **kwargs)


def planted(
    *, num_images: int = 400, share: float = 0.03, block: int = 1, norm: float = 400.0, seed: int = 0
) -> Planted:
    """Plant class-coded tokens of a given norm after a block, at random patches and at least at one of every image."""
    generator = torch.Generator().manual_seed(seed)
    vit = randomised(timm.create_model("vit_tiny_reg2_plain", num_classes=0, img_size=64, **TINY), seed=seed)
    vit.pretrained_cfg = vit.pretrained_cfg | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    with torch.no_grad():
        vit.pos_embed.mul_(8)
        for layer in vit.blocks:  # blocks add little, so that tokens hold what they were given: position and colour
            layer.attn.proj.weight.mul_(0.02)
            layer.mlp.fc2.weight.mul_(0.02)
    colours = torch.randint(256, (num_images, 3, GRID, GRID), generator=generator, dtype=torch.uint8)
    pictures = colours.repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
    pictures[:, 0, 0, 0] = torch.arange(num_images) % 256
    pictures[:, 1, 0, 0] = torch.arange(num_images) // 256
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    outliers = torch.rand(num_images, GRID**2, generator=generator) < share
    outliers[torch.arange(num_images), torch.randint(GRID**2, (num_images,), generator=generator)] = True
    codes = nn.functional.normalize(torch.randn(NUM_CLASSES, vit.embed_dim, generator=generator), dim=-1) * norm
    tokens = codes[labels][:, None] * outliers[..., None]
    vit.__class__ = _Numbered
    vit.blocks[block] = _Planting(vit.blocks[block], vit, tokens)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f"class {i}" for i in range(NUM_CLASSES)])
    )
    images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    return Planted(
        model=vit,
        data=datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features),
        pixels=pictures.float() / 255 * 2 - 1,
        outliers=outliers,
    )
