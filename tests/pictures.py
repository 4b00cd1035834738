"""Pictures that tell their number, and data sets of them."""

import datasets
from PIL import Image


def picture(number, size=(6, 4), mode="RGB"):
    """A picture that tells its number in every pixel."""
    return Image.new("RGB", size, (number, number // 2, 255 - number)).convert(mode)


def data_set(count, **columns):
    """Pictures 0, 1, ... with labels 0, 1, 2, 0, ..."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    rows = {"image": [picture(i) for i in range(count)], "label": [i % 3 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)
