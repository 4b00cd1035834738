"""Scores of depth: those that DINOv3's code gave, and those of known maps."""

import math
from dataclasses import asdict

import pytest
import torch
from checkpoints import GOLDEN
from safetensors.torch import load_file

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.depth_metrics import METRICS, DepthErrors, crop_mask, depth_scores, least_squares

CASE = GOLDEN / "eval_depth_metrics"
INPUTS, EXPECTED = load_file(CASE / "inputs.safetensors"), load_file(CASE / "expected.safetensors")
OFFICIAL_NAMES = {"log10": "log_10"}
CROPS = {"FULL": None, "NYU_EIGEN": "nyu_eigen"}
UNLIMITED = dict(min_depth=0, max_depth=math.inf)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("i", [0, 1])
def test_scores_are_the_official_ones(i, crop):
    scores = depth_scores(INPUTS[f"pred_{i}"], INPUTS[f"gt_{i}"], crop=CROPS[crop], **UNLIMITED)
    for name, value in asdict(scores).items():
        official = EXPECTED[f"{i}.{crop}.{OFFICIAL_NAMES.get(name, name)}"].item()
        assert value == pytest.approx(official, rel=1e-5), name


@pytest.mark.parametrize("i", [0, 1])
def test_alignment_is_the_official_one(i):
    prediction, target = INPUTS[f"pred_{i}"], INPUTS[f"gt_{i}"]
    valid = target > 0
    found = least_squares(prediction[valid].double(), target[valid].double())
    torch.testing.assert_close(torch.stack(found).float(), EXPECTED[f"{i}.scale_shift"], rtol=1e-4, atol=1e-4)
    aligned = depth_scores(EXPECTED[f"{i}.aligned"], target, **UNLIMITED)
    ours = depth_scores(prediction, target, align=True, **UNLIMITED)
    assert asdict(ours) == pytest.approx(asdict(aligned), rel=1e-3)


def test_crop_is_the_official_one():
    for height, width, *_, top, bottom, left, right in EXPECTED["crop_table"].tolist():
        rows, columns = crop_mask((height, width), "nyu_eigen").nonzero().unbind(1)
        found = (rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1)
        assert found == (top, bottom, left, right)


def test_known_maps():
    target = torch.full((4, 4), 2.0)
    target[0] = 0  # unknown
    target[1] = 50  # too far
    prediction = torch.full((4, 4), 3.0)
    scores = depth_scores(prediction, target)
    assert scores.rmse == scores.mae == pytest.approx(1)
    assert scores.abs_rel == scores.sq_rel == pytest.approx(0.5)
    assert scores.rmse_log == pytest.approx(math.log(1.5))
    assert scores.log10 == pytest.approx(math.log10(1.5))
    assert scores.silog == pytest.approx(0, abs=1e-5)
    assert (scores.a1, scores.a2, scores.a3) == (0, 1, 1)
    assert depth_scores(target * 3 + 1, target, align=True).rmse == pytest.approx(0, abs=1e-6)
    assert depth_scores(prediction * 100, target).rmse == pytest.approx(8)  # cut to 10 m


def test_scores_are_means_over_images_whoever_counts():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(4, 8, 9, generator=generator) * 9 + 0.5
    target[1, 2:] = 0  # few pixels count as much as many
    target[2] = 0  # nothing to score
    prediction = target + torch.rand(4, 8, 9, generator=generator)
    together = asdict(depth_scores(prediction, target))
    each = [asdict(depth_scores(p, t)) for p, t in zip(prediction, target, strict=True)]
    assert math.isnan(each[2]["rmse"])
    for name in METRICS:
        assert together[name] == pytest.approx(sum(each[i][name] for i in (0, 1, 3)) / 3)
    errors = [DepthErrors.of(p, t) for p, t in zip(prediction, target, strict=True)]
    merged = DepthErrors.together([errors[3], DepthErrors.together([errors[1], errors[0]]), errors[2]])
    assert asdict(merged.scores()) == pytest.approx(together)


def test_what_makes_no_sense_is_one_sentence():
    depth = torch.ones(4, 4)
    with pytest.raises(DataError, match="no crop 'garg'"):
        depth_scores(depth, depth, crop="garg")
    with pytest.raises(DataError, match="min_depth is 2 and max_depth is 1"):
        depth_scores(depth, depth, min_depth=2, max_depth=1)
