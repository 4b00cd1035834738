"""Discovery over pictures: the official run on a folder, sweeps in one pass, and scores that are known."""

from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
from checkpoints import GOLDEN
from models import randomised
from PIL import Image
from recorded import expected, inputs
from safetensors.torch import load_file

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.discovery import Setting, discovery, find_boxes, normalised, sweep_settings
from vitreg_hub.evaluation.lost import lost_box
from vitreg_hub.network.position_rule import PositionRule
from vitreg_hub.network.positions import follow
from vitreg_hub.tokens import observe

CASE = "eval_discovery"
IMAGES = 6


@dataclass(frozen=True)
class Picture:
    """What sources of annotated pictures give."""

    image: Image.Image
    boxes: np.ndarray | None
    name: str
    index: int


@pytest.fixture(scope="module")
def official_model():
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=96,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        num_classes=0,
        dynamic_img_size=True,
    )
    model.load_state_dict(load_file(GOLDEN / CASE / "checkpoint.safetensors"))
    follow(model, PositionRule(antialias=False, offset=0.1))  # as DINO resamples
    return model.eval()


@pytest.fixture(scope="module")
def folder():
    given, truths = inputs(CASE), expected(CASE)
    return [
        Picture(Image.fromarray(given[f"image_{i}"].numpy()), truths[f"gt.image_{i}"].numpy(), f"{i}.jpg", i)
        for i in range(IMAGES)
    ]


def small_vit(**changes):
    args = {"depth": 5, "embed_dim": 32, "num_heads": 2, "img_size": 32, "dynamic_img_size": True, "num_classes": 0}
    return randomised(timm.create_model("vit_nano_reg4", **args | changes))


@pytest.mark.parametrize("which", ["keys", "queries", "values"])
def test_official_run(official_model, folder, which):
    official, letter = expected(CASE), which[0]
    ours = discovery(official_model, folder, which=which)
    for i in range(IMAGES):
        assert ours.boxes[i].tolist() == official[f"lost.{letter}.k100.image_{i}.box"].tolist()
    assert ours.hits.tolist() == official[f"lost.{letter}.k100.corloc_per_image"].tolist()
    assert ours.corloc.value == pytest.approx(ours.hits.mean())
    assert ours.corloc.low < ours.corloc.value < ours.corloc.high
    assert (ours.setting, ours.chosen_on) == (Setting(which=which), "given")


def test_official_features(official_model, folder):
    for i in range(IMAGES):
        image = normalised(folder[i].image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        padded = torch.zeros(1, 3, *(-(-side // 16) * 16 for side in image.shape[1:]))
        padded[0, :, : image.shape[1], : image.shape[2]] = image
        seen = observe(official_model, padded, projections=(1,)).projections[1]
        for letter, tokens in (("k", seen.keys), ("q", seen.queries), ("v", seen.values)):
            assert (tokens.patches[0] - expected(CASE)[f"features.{letter}.image_{i}"]).abs().max() < 2e-5


def test_a_sweep_passes_each_image_once_and_equals_single_runs(folder):
    model, passes = small_vit(), []
    model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    swept = discovery(model, folder, sweep=True, biases=(0.0, -0.3), normalize=True)
    assert len(passes) == IMAGES
    assert list(swept.tried) == list(sweep_settings((0.0, -0.3)))
    assert len(swept.tried) == 3 * 4 * 2
    assert swept.corloc.value == max(swept.tried.values()) > min(swept.tried.values())
    assert swept.chosen_on == "the best of 24 settings on the test images themselves"
    alone = Setting(which="values", block=-3, bias=-0.3)
    single = discovery(model, folder, which="values", block=-3, biases=(-0.3,), normalize=True)
    assert single.corloc.value == swept.tried[alone]
    seen = find_boxes(model, folder, [Setting(), alone], normalize=True)
    assert np.array_equal(seen.boxes[1], single.boxes)


def test_registers_are_taken_off():
    model = small_vit()
    picture = Picture(Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 40).convert("RGB"), None, "a", 0)
    seen = find_boxes(model, [picture], [Setting()], mean=(0.5,) * 3, std=(0.5,) * 3)
    images = normalised(picture.image, mean=(0.5,) * 3, std=(0.5,) * 3)[None]
    keys = observe(model, images, projections=(-1,)).projections[-1].keys
    grid = (32 // model.patch_embed.patch_size[0], 48 // model.patch_embed.patch_size[1])
    box = lost_box(keys.patches[0], grid=grid, patch_size=model.patch_embed.patch_size, image_size=(32, 48))
    assert seen.boxes[0, 0].tolist() == list(box.box)
    assert np.isnan(seen.hits[0, 0])


def test_the_choice_can_be_made_on_other_images(folder):
    model = small_vit()
    held_out, test = folder[:3], folder[3:]
    ours = discovery(model, test, sweep=True, held_out=held_out, normalize=True, biases=(0.0, -0.2))
    on_held_out = discovery(model, held_out, sweep=True, normalize=True, biases=(0.0, -0.2))
    assert ours.setting == on_held_out.setting
    assert ours.tried == on_held_out.tried
    assert ours.chosen_on == "the best of 24 settings on 3 held-out images"
    assert len(ours.hits) == 3
    assert ours.names == ("3.jpg", "4.jpg", "5.jpg")


def bright_square(rng: np.random.Generator, index: int) -> Picture:
    """A picture of 60 x 76 pixels: noise, and a square of other noise on the lattice of patches."""
    pixels = np.full((60, 76, 3), 90.0)
    top, left = 8 * rng.integers(1, 4), 8 * rng.integers(1, 6)
    pixels[top : top + 24, left : left + 24] = 200
    pixels += rng.normal(0, 4, pixels.shape)
    box = np.array([[left, top, left + 24, top + 24]], dtype=np.float32)
    return Picture(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), box, f"square {index}", index)


def test_a_network_that_sees_brightness_finds_all_and_boxes_of_others_nothing():
    model = small_vit(depth=1, reg_tokens=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / 192  # the mean of a patch, dark or bright, and minus it
        model.patch_embed.proj.weight[1] = -1 / 192
        model.blocks[0].norm1.weight.fill_(1)
        model.blocks[0].attn.qkv.weight[32:64] = torch.eye(32)
    rng = np.random.default_rng(0)
    pictures = [bright_square(rng, i) for i in range(12)]
    ours = discovery(model, pictures, mean=(0.55,) * 3, std=(1.0,) * 3)
    assert ours.corloc.value == 1
    assert all(box.tolist() == picture.boxes[0].tolist() for box, picture in zip(ours.boxes, pictures, strict=True))
    elsewhere = [
        Picture(picture.image, np.array([[0, 0, 8, 8]], dtype=np.float32), picture.name, picture.index)
        for picture in pictures
    ]
    assert discovery(model, elsewhere, mean=(0.55,) * 3, std=(1.0,) * 3).corloc.value == 0


def test_mistakes(folder):
    with pytest.raises(DataError, match="biases is empty"):
        discovery(small_vit(), folder, biases=())
    with pytest.raises(DataError, match="block -9 does not exist"):
        discovery(small_vit(), folder, block=-9)
    with pytest.raises(DataError, match="there are no images"):
        discovery(small_vit(), [])
    with pytest.raises(DataError, match="dynamic_img_size=True"):
        discovery(small_vit(dynamic_img_size=False), folder)
    with pytest.raises(DataError, match="no image has a true box"):
        discovery(small_vit(), [Picture(folder[0].image, None, "a", 0)])
