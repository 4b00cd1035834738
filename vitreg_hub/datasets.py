"""Data sets that ship with the package's dependencies, as ordinary `datasets.Dataset`s."""

from typing import Literal

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT_EVERY = 5
"""Every fifth digit is held out, so that each of the writers, who follow one another, is on both sides."""


def digits(split: Literal["train", "test"]) -> datasets.Dataset:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels, 10 classes, from 43 writers.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
    (its test part); in scikit-learn as `load_digits`.

    Args:
        split: "test" is every fifth image by index (359), "train" the other 1,438.

    Returns:
        Columns `image` (RGB) and `label`.
    """
    source = load_digits()
    held_out = np.arange(len(source.target)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    pixels = np.round(source.images[chosen] * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p).convert("RGB") for p in pixels], "label": source.target[chosen]},
        features=datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in source.target_names])
        ),
    )
