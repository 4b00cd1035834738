"""Embedded data sets against their source."""

import colorsys

import datasets
import numpy as np
import pytest
import skimage.data
from skimage.color import gray2rgb
from skimage.measure import label as label_regions
from skimage.measure import regionprops
from sklearn.datasets import load_digits, load_sample_image

from vitreg_hub.images.embedded import EMBEDDED, TRAINING_SETS, digits, photos, scenes

HUES = {"red": 359, "orange": 31, "yellow": 54, "green": 129, "cyan": 184, "blue": 230, "purple": 280, "pink": 331}
"""Degrees on the colour wheel."""

SHAPES = {"circle": (1, 1), "square": (0.64, 1), "triangle": (0.41, 1), "star": (0.37, 0.49), "cross": (0.47, 0.68)}
"""Area as a share of the circle around and of the convex hull. Only a ring has a hole."""


def test_digits_are_scikit_learns_and_split_by_index():
    source = load_digits()
    train, test = digits("train"), digits("test")
    assert isinstance(train, datasets.Dataset)
    assert (len(train), len(test)) == (1438, 359)
    assert train.features["label"].names == [str(i) for i in range(10)]
    assert test["label"][:] == source.target[4::5].tolist()
    assert sorted(train["label"][:] + test["label"][:]) == sorted(source.target.tolist())
    picture = np.asarray(test[7]["image"])
    assert picture.shape == (8, 8, 3)
    expected = np.round(source.images[4 + 5 * 7] * 255 / 16)
    assert all(np.array_equal(picture[..., channel], expected) for channel in range(3))


def source_picture(name):
    """The picture as scikit-learn or scikit-image gives it, in colours."""
    if name in ("china", "flower"):
        return load_sample_image(f"{name}.jpg")
    if name == "motorcycle_left":
        return skimage.data.stereo_motorcycle()[0]
    picture = getattr(skimage.data, {"ihc": "immunohistochemistry"}.get(name, name))()
    return picture if picture.ndim == 3 else gray2rgb(picture)


def test_photos_are_all_whole_tiles_of_every_picture():
    tiles = photos()
    names = tiles.features["label"].names
    assert tiles.column_names == ["image", "label"]
    assert (len(tiles), len(names), len(set(names))) == (238, 15, 15)
    start = 0
    for label, name in enumerate(names):
        picture = source_picture(name)
        rows, columns = picture.shape[0] // 128, picture.shape[1] // 128
        part = tiles.select(range(start, start + rows * columns))
        assert set(part["label"][:]) == {label}
        grid = np.stack([np.asarray(tile) for tile in part["image"]]).reshape(rows, columns, 128, 128, 3)
        whole = grid.swapaxes(1, 2).reshape(rows * 128, columns * 128, 3)
        assert np.array_equal(whole, picture[: rows * 128, : columns * 128]), name
        start += rows * columns
    assert start == len(tiles)


def test_photos_need_no_download_and_leave_nothing_on_the_disk(monkeypatch):
    monkeypatch.setattr("skimage.data._fetchers._fetch", None)
    assert not photos().cache_files


def test_every_fifth_photo_is_held_out():
    every, train, test = (rows(photos(split)) for split in (None, "train", "test"))
    assert (len(train), len(test)) == (191, 47)
    assert test == every[4::5]
    assert train == [row for i, row in enumerate(every) if i % 5 != 4]


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
        assert data.column_names == ["image", "label", "text"]
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


def test_embedded_names():
    assert {name: len(load()) for name, load in EMBEDDED.items()} == {"photos": 238, "digits": 359, "scenes": 480}


def test_training_sets_are_made_by_split():
    assert {"digits": digits, "photos": photos, "scenes": scenes} == TRAINING_SETS
