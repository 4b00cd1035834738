"""Embedded data sets against their source."""

import datasets
import numpy as np
from sklearn.datasets import load_digits

from vitreg_hub.datasets import digits


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
