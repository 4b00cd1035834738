"""LOST's boxes and CorLoc against what the official code gave, and on features where the object is known."""

import json

import numpy as np
import pytest
import torch
from checkpoints import GOLDEN
from recorded import expected, inputs

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.lost import corloc, found, lost_box

CASES = json.loads((GOLDEN / "lost_boxes/meta.json").read_text())["images"]
IMAGES = 6
GRIDS = ((6, 6), (7, 5), (4, 8), (6, 8), (7, 5), (5, 7))
"""Of the images of eval_discovery."""


@pytest.mark.parametrize("index", range(len(CASES)))
def test_boxes_of_features_are_the_official_ones(index):
    case, official = CASES[index], expected("lost_boxes")
    where = {"grid": tuple(case["grid"]), "patch_size": case["patch"], "image_size": tuple(case["image_size_hw"])}
    features = inputs("lost_boxes")[f"img{index}.feats"][0]
    ours = lost_box(features, k_patches=case["k_patches"], **where)
    assert ours.seed == official[f"img{index}.seed"]
    assert list(ours.expanded) == official[f"img{index}.expanded_seeds_sorted"].tolist()
    assert list(ours.box) == official[f"img{index}.box_xyxy"].tolist()
    alone = lost_box(features, k_patches=1, **where)
    assert list(alone.box) == official[f"img{index}.box_from_seed_only_xyxy"].tolist()


@pytest.mark.parametrize(("which", "k_patches"), [("k", 100), ("k", 1), ("q", 100), ("v", 100)])
def test_official_run_over_a_folder(which, k_patches):
    official, sizes = expected("eval_discovery"), [inputs("eval_discovery")[f"image_{i}"].shape for i in range(IMAGES)]
    boxes = []
    for i in range(IMAGES):
        ours = lost_box(
            official[f"features.{which}.image_{i}"],
            grid=GRIDS[i],
            patch_size=16,
            image_size=tuple(sizes[i][:2]),
            k_patches=k_patches,
        )
        assert ours.seed == official[f"lost.{which}.k{k_patches}.image_{i}.seed"]
        assert list(ours.box) == official[f"lost.{which}.k{k_patches}.image_{i}.box"].tolist()
        boxes.append(ours.box)
    truths = [official[f"gt.image_{i}"] for i in range(IMAGES)]
    per_image = official[f"lost.{which}.k{k_patches}.corloc_per_image"]
    assert found(boxes, truths).tolist() == per_image.tolist()
    assert corloc(boxes, truths) == pytest.approx(per_image.mean().item())


def test_images_without_easy_boxes_are_left_out_as_officially():
    official = expected("eval_discovery")
    boxes = [official[f"lost.k.k100.image_{i}.box"] for i in range(IMAGES)]
    assert corloc(boxes, [official[f"gt_no_hard.image_{i}"] for i in range(IMAGES)]) == pytest.approx(0.4)
    assert np.isnan(found(boxes[:1], [None])[0])


def test_one_of_several_boxes_is_enough_and_exactly_half_counts():
    truths = [[(50, 50, 60, 60), (0, 0, 10, 20)]]
    assert corloc([(0, 0, 10, 10)], truths) == 1
    assert corloc([(0, 0, 10, 9)], truths) == 0


def planted(rows: int, columns: int, part: tuple[slice, slice], *, seed: int = 0, noise: float = 0.05) -> torch.Tensor:
    """Features of a background and an object whose patches are unlike it."""
    features = torch.zeros(rows, columns, 8)
    features[..., 0] = 1
    features[part] = torch.eye(8)[1] - 0.5 * torch.eye(8)[0]
    return (features + noise * torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))).flatten(0, 1)


def test_a_planted_object_is_found():
    box = lost_box(
        planted(12, 15, (slice(3, 7), slice(9, 14))), grid=(12, 15), patch_size=(16, 8), image_size=(190, 118)
    )
    assert box.box == (72, 48, 112, 112)
    assert set(box.expanded) == {15 * row + column for row in range(3, 7) for column in range(9, 14)}
    at_the_edge = planted(12, 15, (slice(9, 12), slice(11, 15)))
    box = lost_box(at_the_edge, grid=(12, 15), patch_size=(16, 8), image_size=(190, 118))
    assert box.box == (88, 144, 118, 190)  # cut to the image


def test_bias_is_added_to_every_product():
    features = planted(9, 9, (slice(2, 5), slice(3, 6)))
    where = {"grid": (9, 9), "patch_size": 1, "image_size": (9, 9)}
    raised = torch.cat([features, torch.full((81, 1), 2.0)], dim=1)  # now all products are positive
    assert lost_box(raised, **where).box == (0, 0, 9, 9)
    assert lost_box(raised, bias=-4, **where) == lost_box(features, **where)
    assert lost_box(features, **where).box == (3, 2, 6, 5)
    nothing = lost_box(features, bias=-1e6, **where)
    assert (nothing.expanded, nothing.box) == ((), (0, 0, 1, 1))


def test_diagonal_neighbours_are_not_connected():
    features = torch.ones(5, 5, 2)
    features[1, 1] = features[2, 2] = torch.tensor([-1.0, 0.5])
    box = lost_box(features.flatten(0, 1), grid=(5, 5), patch_size=10, image_size=(50, 50), k_patches=2)
    assert box.seed == 6
    assert box.box == (10, 10, 20, 20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_count_alike(dtype):
    features = planted(7, 8, (slice(1, 4), slice(2, 6)))
    where = {"grid": (7, 8), "patch_size": 4, "image_size": (28, 32)}
    assert lost_box(features.to(dtype), **where) == lost_box(features, **where)


def test_wrong_arguments():
    with pytest.raises(DataError, match="5 x 5 patches"):
        lost_box(torch.ones(24, 3), grid=(5, 5), patch_size=1, image_size=(5, 5))
    with pytest.raises(DataError, match="at least 1 patch"):
        lost_box(torch.ones(25, 3), grid=(5, 5), patch_size=1, image_size=(5, 5), k_patches=0)
    with pytest.raises(DataError, match="2 boxes for 1 images"):
        corloc([(0, 0, 1, 1)] * 2, [None])
    with pytest.raises(DataError, match="no image has a true box"):
        corloc([(0, 0, 1, 1)], [np.zeros((0, 4))])
