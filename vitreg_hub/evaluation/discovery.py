"""Object discovery with a ViT's features: LOST on queries, keys or values of any block, scored by CorLoc."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.lost import K_PATCHES, box_of_products, found, share_found
from vitreg_hub.evaluation.scores import Share
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.passes import failing_together, gathered
from vitreg_hub.tokens import observe

Which = Literal["queries", "keys", "values"]

BIASES = (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7, -0.8, -0.9)
"""Of a sweep over features of length 1. Source: the test-time registers' repository, which sweeps -1 to 0."""
LAST_BLOCKS = 4
"""Blocks of a sweep, from the end; source as of `BIASES`."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What official runs normalise pixels with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What LOST reads.

    Attributes:
        which: Queries, keys or values.
        block: Whose, from the end: -1 is the last.
        bias: As in `lost_box`.
    """

    which: Which = "keys"
    block: int = -1
    bias: float = 0.0

    def __str__(self) -> str:
        """For example "keys of block -1, bias -0.2"."""
        return f"{self.which} of block {self.block}, bias {self.bias:g}"


def sweep_settings(biases: Sequence[float] = BIASES) -> tuple[Setting, ...]:
    """Queries, keys and values of the last four blocks, with every bias; what official runs read comes first."""
    order: tuple[Which, ...] = ("keys", "queries", "values")
    return tuple(
        Setting(which=which, block=block, bias=bias)
        for block in range(-1, -LAST_BLOCKS - 1, -1)
        for which in order
        for bias in biases
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Boxes of images under several settings.

    Attributes:
        names: Of the images [N].
        settings: [S].
        boxes: [S, N, 4] left, top, right and bottom edge in pixels.
        hits: [S, N] as `found` gives them.
    """

    names: tuple[str, ...]
    settings: tuple[Setting, ...]
    boxes: np.ndarray
    hits: np.ndarray

    @property
    def scores(self) -> dict[Setting, float]:
        """CorLoc by setting."""
        return {setting: share_found(hits) for setting, hits in zip(self.settings, self.hits, strict=True)}

    @property
    def best(self) -> Setting:
        """The setting with the highest CorLoc, of equal ones the first."""
        return max(self.settings, key=self.scores.__getitem__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscoveryScore:
    """How often one box per image holds an object.

    Attributes:
        setting: The one that was taken.
        chosen_on: How it was chosen, in words: a score that was chosen on the images it is of is too high.
        corloc: CorLoc of that setting, with its 95 % interval.
        names: Of the images [N].
        boxes: [N, 4] of that setting: left, top, right and bottom edge in pixels.
        hits: [N] 1 or 0; not a number for images without true boxes, which do not count.
        tried: CorLoc of every setting on the images on which was chosen.
    """

    setting: Setting
    chosen_on: str
    corloc: Share
    names: tuple[str, ...]
    boxes: np.ndarray
    hits: np.ndarray
    tried: dict[Setting, float]


def discovery(
    model: nn.Module,
    source: Any,
    *,
    which: Which = "keys",
    block: int = -1,
    biases: Sequence[float] = (0.0,),
    sweep: bool = False,
    held_out: Any = None,
    normalize: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    k_patches: int = K_PATCHES,
    rank: int = 0,
    world_size: int = 1,
) -> DiscoveryScore:
    """Score LOST's boxes by CorLoc. Each image passes once at its own size, whatever the number of settings.

    Source: valeoai/LOST, main_lost.py: no resizing; zeros on the right and below up to a multiple of the patch, after
    normalisation. It takes off the class token only, here registers are taken off, too.

    Args:
        model: A ViT of timm or transformers that takes images of any size (timm: `dynamic_img_size=True`).
        source: Pictures with boxes: `len(source)`, and `source[i]` with `.image` (PIL, RGB), `.boxes` ([K, 4] left,
            top, right, bottom in pixels, or None) and `.name`.
        which: Whether to read queries, keys or values; the registers paper reads keys of DINOv2, else values.
        block: Whose; negative indices count from the end.
        biases: As in `lost_box`; if there are several, the best is taken.
        sweep: Try queries, keys and values of the last four blocks with every bias; `which` and `block` are not used.
        held_out: Other pictures, on which the best setting is chosen; by default it is chosen on the same ones.
        normalize: Divide features by their length, so that biases are cosines. Official runs do not.
        mean: Of the channels, for pixels in [0, 1].
        std: Standard deviations of the channels.
        k_patches: As in `lost_box`.
        rank: Which of the processes this is; all must call it.
        world_size: Number of processes, which share the images.

    Raises:
        DataError: The model cannot be read or refuses a size, a block does not exist, or no image has boxes.
    """
    if not biases:
        raise DataError("biases is empty: give at least one number, such as 0.")
    if sweep:
        settings = sweep_settings(biases)
    else:
        settings = tuple(Setting(which=which, block=block, bias=bias) for bias in biases)

    def found_in(pictures: Any, settings: Sequence[Setting]) -> Found:
        return find_boxes(
            model,
            pictures,
            settings,
            normalize=normalize,
            mean=mean,
            std=std,
            k_patches=k_patches,
            rank=rank,
            world_size=world_size,
        )

    chosen_on = "given"
    if len(settings) > 1 and held_out is not None:
        trial = found_in(held_out, settings)
        seen = found_in(source, [trial.best])
        chosen_on = f"the best of {len(settings)} settings on {len(trial.names)} held-out images"
    else:
        trial = seen = found_in(source, settings)
        if len(settings) > 1:
            chosen_on = f"the best of {len(settings)} settings on the test images themselves"
    place = seen.settings.index(trial.best)
    hits = seen.hits[place]
    return DiscoveryScore(
        setting=trial.best,
        chosen_on=chosen_on,
        corloc=Share.of(float(np.nansum(hits)), int((~np.isnan(hits)).sum())),
        names=seen.names,
        boxes=seen.boxes[place],
        hits=hits,
        tried=trial.scores,
    )


def find_boxes(
    model: nn.Module,
    source: Any,
    settings: Sequence[Setting],
    *,
    normalize: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    k_patches: int = K_PATCHES,
    rank: int = 0,
    world_size: int = 1,
) -> Found:
    """LOST's boxes of images under several settings, in one pass; arguments and errors as of `discovery`."""
    patch = tuple(int(step) for step in VitLayout.of(model).embedding.stride)
    mine = []
    with failing_together(world_size=world_size):
        for index in range(rank, len(source), world_size):
            picture = source[index]
            image = normalised(picture.image, mean=mean, std=std)
            boxes = _boxes_of(model, image, settings, patch=patch, normalize=normalize, k_patches=k_patches)
            hits = [found([box], [picture.boxes])[0] for box in boxes]
            mine.append((index, picture.name, boxes, hits))
    rows = sorted(row for share in gathered(mine, world_size=world_size) for row in share)
    if not rows:
        raise DataError("there are no images: give at least one.")
    _, names, boxes, hits = zip(*rows, strict=True)
    return Found(
        names=names,
        settings=tuple(settings),
        boxes=np.array(boxes, dtype=np.float64).transpose(1, 0, 2),
        hits=np.array(hits).T,
    )


def normalised(image: Image.Image, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[3, H, W] of an RGB picture."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _boxes_of(
    model: nn.Module,
    image: Tensor,
    settings: Sequence[Setting],
    *,
    patch: tuple[int, ...],
    normalize: bool,
    k_patches: int,
) -> list[tuple[float, float, float, float]]:
    """The box of every setting."""
    height, width = image.shape[1:]
    padded = F.pad(image, (0, -width % patch[1], 0, -height % patch[0]))[None]
    seen = observe(model, padded, projections=tuple({setting.block for setting in settings}))
    products: dict[tuple[Which, int], Tensor] = {}
    boxes = []
    for setting in settings:
        key = setting.which, setting.block
        if key not in products:
            features = getattr(seen.projections[setting.block], setting.which).patches[0]
            features = F.normalize(features, dim=-1) if normalize else features
            products = {key: features @ features.T}  # one at a time
        box = box_of_products(
            products[key],
            grid=seen.order.grid,
            patch_size=(patch[0], patch[1]),
            image_size=(height, width),
            k_patches=k_patches,
            bias=setting.bias,
        )
        boxes.append(box.box)
    return boxes
