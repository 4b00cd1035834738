"""Drawn scenes show what is said of them."""

import colorsys

import datasets
import numpy as np
import pytest
from skimage.measure import label as label_regions
from skimage.measure import regionprops

from vitreg_hub.images.scenes import MASK_CLASSES, scenes

HUES = {"red": 359, "orange": 31, "yellow": 54, "green": 129, "cyan": 184, "blue": 230, "purple": 280, "pink": 331}
"""Degrees on the colour wheel."""

SHAPES = {"circle": (1, 1), "square": (0.64, 1), "triangle": (0.41, 1), "star": (0.37, 0.49), "cross": (0.47, 0.68)}
"""Area as a share of the circle around and of the convex hull. Only a ring has a hole."""


def rows(data):
    """What is stored, with the files' bytes."""
    return list(data.cast_column("image", datasets.Image(decode=False)))


@pytest.fixture(scope="module")
def drawn():
    return {split: scenes(split) for split in ("train", "test")}


def test_scenes_have_every_class_alike_and_captions_with_its_name(drawn):
    for split, each in (("train", 84), ("test", 10)):
        data = drawn[split]
        names = data.features["label"].names
        assert {"image", "label", "text"} <= set(data.column_names)
        assert len(set(names)) == 48
        assert np.bincount(data["label"][:]).tolist() == [each] * 48
        assert set(data["label"][:48]) == set(range(48))
        for label, text in zip(data["label"][:], data["text"][:], strict=True):
            assert names[label] in text
            assert sum(name in text for name in names) == 1
            assert not {" a o", " an s", " an l", "  "} & {text[i : i + n] for n in (2, 4, 5) for i in range(len(text))}
    captions = set(drawn["train"]["text"][:])
    assert len(captions) > 1000
    assert {"small", "large", "left", "right", "top", "bottom", "middle"} <= set(" ".join(captions).split())


def test_scenes_are_the_same_in_every_call_and_others_in_the_test_part(drawn):
    train, test = rows(drawn["train"]), rows(drawn["test"])
    assert rows(scenes("test")) == test
    pictures = [row["image"]["bytes"] for row in train + test]
    assert len(set(pictures)) == len(pictures)


def object_of(picture):
    """The largest region of strong colour, and its mean colour."""
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (64, 64, 3)
    regions = regionprops(label_regions(np.ptp(pixels, axis=2) > 70))
    region = max(regions, key=lambda found: found.area)
    return region, pixels[tuple(region.coords.T)].mean(axis=0)


def test_scenes_show_what_their_captions_say(drawn):
    data = drawn["test"]
    names, right = data.features["label"].names, 0
    for picture, label, text in zip(data["image"], data["label"][:], data["text"][:], strict=True):
        region, mean = object_of(picture)
        color, shape = names[label].split()
        hue = 360 * colorsys.rgb_to_hsv(*mean / 255)[0]
        assert min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180)) == color
        y, x = region.centroid
        radius = np.hypot(*(region.coords - region.centroid).T).max()
        for word, holds in (
            *(("left", x < 23), ("right", x > 41), ("top", y < 23), ("bottom", y > 41)),
            *(("middle", 20 < x < 44 and 20 < y < 44), ("small", radius < 14), ("large", radius > 14)),
        ):
            assert holds or word not in text.replace("small grey", ""), text
        fill = region.area / (np.pi * (radius + 0.5) ** 2)
        nearest = min(SHAPES, key=lambda name: np.hypot(fill - SHAPES[name][0], region.solidity - SHAPES[name][1]))
        right += ("ring" if region.euler_number < 1 else nearest) == shape
    assert right >= 0.95 * len(data)


def test_boxes_masks_and_instances_say_the_same(drawn):
    data = drawn["test"]
    names = data.features["label"].names
    for row in data:
        instances, mask = np.asarray(row["instances"]), np.asarray(row["mask"])
        there = instances == 1
        assert np.array_equal(mask > 0, there)
        shape = names[row["label"]].split()[1]
        assert set(np.unique(mask)) == {0, MASK_CLASSES.index(shape)}
        assert shape in row["text"]
        ((y, x),) = [region.slice for region in regionprops(there.astype(int))]
        assert row["boxes"] == [[x.start, y.start, x.stop, y.stop]]
        strong = np.ptp(np.asarray(row["image"]).astype(int), axis=2) > 70
        assert (strong & there).sum() > 0.7 * (strong | there).sum()


def test_what_is_nearer_hides_what_is_farther_and_looks_larger(drawn):
    sizes, near = [], []
    for row in drawn["test"]:
        instances, depth = np.asarray(row["instances"]), np.asarray(row["depth"]) / 1000
        (object_at,) = set(depth[instances == 1])
        behind = depth[instances > 1]
        assert object_at <= 3.0 <= behind.min(initial=9)
        background = np.where(instances == 0, depth, np.nan)
        assert np.nanmin(background) >= 6.0 > behind.max(initial=0)
        assert np.nanmean(background[:8]) > np.nanmean(background[-8:])
        sizes.append(np.sqrt((instances == 1).sum()))
        near.append(1 / object_at)
    assert np.corrcoef(sizes, near)[0, 1] > 0.8


def test_half_of_the_backgrounds_are_real_textures(drawn):
    flat = []
    for row in drawn["test"]:
        pixels = np.asarray(row["image"])[np.asarray(row["instances"]) == 0].astype(int)
        _, counts = np.unique(pixels, axis=0, return_counts=True)
        flat.append(counts.max() > 0.5 * len(pixels))  # edges of shapes are mixed
    assert 0.4 < np.mean(flat) < 0.6
