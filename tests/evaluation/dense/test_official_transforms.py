"""Pictures become the tensors that DINOv3's code makes of them."""

import pytest
import torch
from dense_golden import case
from PIL import Image

from vitreg_hub.evaluation.dense.heads import as_tensor
from vitreg_hub.evaluation.dense.scoring import views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("i", range(3))
def test_pictures_are_resized_and_normalised_as_officially(i):
    inputs, expected, _ = case("eval_segmentation_transforms")
    picture = Image.fromarray(inputs[f"image_{i}"].numpy())
    (view,) = views(picture, crop=32, scales=(1.0,))
    torch.testing.assert_close(as_tensor(view, mean=MEAN, std=STD), expected[f"slide_{i}.image"], rtol=0, atol=1e-5)
    sizes = [[view.height, view.width] for view in views(picture, crop=32, scales=(0.75, 1, 1.25))]
    assert sizes + sizes == expected[f"tta_{i}.sizes"].tolist()
