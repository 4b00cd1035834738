"""Embedded data sets against their source."""

import datasets
import numpy as np
import skimage.data
from skimage.color import gray2rgb
from sklearn.datasets import load_digits, load_sample_image

from vitreg_hub.images.embedded import EMBEDDED, TRAINING_SETS, digits, photos, scenes


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


def test_embedded_names():
    assert {name: len(load()) for name, load in EMBEDDED.items()} == {"photos": 238, "digits": 359, "scenes": 480}


def test_training_sets_are_made_by_split():
    assert {"digits": digits, "photos": photos, "scenes": scenes} == TRAINING_SETS
