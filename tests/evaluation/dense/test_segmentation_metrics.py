"""Scores of segmentation: those that DINOv3's code gave, and those of known maps."""

import math

import pytest
import torch
from checkpoints import GOLDEN
from safetensors.torch import load_file

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.segmentation_metrics import (
    SegmentationCounts,
    segmentation_scores,
    zero_label_reduced,
)

CASE = GOLDEN / "eval_segmentation_metrics"
INPUTS, EXPECTED = load_file(CASE / "inputs.safetensors"), load_file(CASE / "expected.safetensors")
PREDICTIONS, LABELS = ([INPUTS[f"{kind}_{i}"] for i in range(4)] for kind in ("pred", "label"))
CLASSES = 7


@pytest.mark.parametrize(("reduce", "ignore"), [(False, 255), (True, 255), (False, 1)])
def test_areas_are_the_official_ones(reduce, ignore):
    for i in range(4):
        counts = SegmentationCounts.of(
            PREDICTIONS[i], LABELS[i], num_classes=CLASSES, ignore_index=ignore, reduce_zero_label=reduce
        )
        found, predicted, true = counts.areas[0]
        official = EXPECTED[f"areas_{i}.reduce_zero_{reduce}.ignore_{ignore}"]
        assert torch.equal(torch.stack([found, predicted + true - found, predicted, true]).float(), official)


@pytest.mark.parametrize("reduce", [False, True])
def test_scores_are_the_official_ones(reduce):
    scores = segmentation_scores(PREDICTIONS, LABELS, num_classes=CLASSES, reduce_zero_label=reduce)
    official = {name.split(".")[2]: value for name, value in EXPECTED.items() if f"total.reduce_zero_{reduce}" in name}
    close = dict(rel=1e-6)
    assert scores.mean_iou == pytest.approx(official["mIoU"].item(), **close)
    assert scores.accuracy == pytest.approx(official["aAcc"].item(), **close)
    assert scores.mean_accuracy == pytest.approx(official["acc"].item(), **close)
    per_class = EXPECTED[f"per_class.reduce_zero_{reduce}.mIoU"]
    torch.testing.assert_close(torch.tensor(scores.per_class), per_class, rtol=1e-6, atol=0, equal_nan=True)
    class_accuracy = EXPECTED[f"per_class.reduce_zero_{reduce}.acc"]
    torch.testing.assert_close(torch.tensor(scores.class_accuracy), class_accuracy, rtol=1e-6, atol=0, equal_nan=True)


def test_zero_label_is_reduced_as_officially():
    for i in range(4):
        assert torch.equal(zero_label_reduced(LABELS[i]), EXPECTED[f"label_reduced_{i}"])


def test_known_maps():
    label = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    prediction = torch.tensor([[0, 1, 1, 1], [2, 2, 0, 0]])
    scores = segmentation_scores(prediction, label, num_classes=4)
    assert scores.per_class[:3] == pytest.approx((1 / 2, 2 / 3, 1))
    assert math.isnan(scores.per_class[3])
    assert scores.mean_iou == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert scores.accuracy == pytest.approx(5 / 6)
    assert scores.mean_accuracy == pytest.approx((1 / 2 + 1 + 1) / 3)


def test_permuted_labels_score_at_chance():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(10, (20, 50, 50), generator=generator)
    assert segmentation_scores(label, label, num_classes=10).mean_iou == 1
    permuted = label.flatten()[torch.randperm(label.numel(), generator=generator)].reshape(label.shape)
    assert segmentation_scores(permuted, label, num_classes=10).mean_iou == pytest.approx(1 / 19, abs=0.005)


def test_scores_do_not_depend_on_who_counts():
    counts = [SegmentationCounts.of(p, t, num_classes=CLASSES) for p, t in zip(PREDICTIONS, LABELS, strict=True)]
    merged = SegmentationCounts.together([counts[2], SegmentationCounts.together([counts[0], counts[3]]), counts[1]])
    at_once = segmentation_scores(iter(PREDICTIONS), iter(LABELS), num_classes=CLASSES)
    assert repr(merged.scores()) == repr(at_once)  # which has a NaN
    stacked = torch.stack([p[:20, :25] for p in PREDICTIONS]), torch.stack([label[:20, :25] for label in LABELS])
    assert repr(segmentation_scores(*stacked, num_classes=8)) == repr(
        segmentation_scores(*map(list, stacked), num_classes=8)
    )


@pytest.mark.parametrize(
    ("prediction", "label", "sentence"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(3, 2).long(), "prediction 0 has 2 x 3 pixels and its truth 3 x 2"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), "give the argmax"),
        (torch.full((2, 3), 4), torch.zeros(2, 3).long(), "classes 4 to 4 are predicted, but there are 4"),
        (torch.zeros(2, 2, 3).long(), torch.zeros(2, 3).long(), "more predictions than truths, which have 1"),
        ([torch.zeros(2, 2, 3).long()], torch.zeros(2, 3).long(), r"map 0 has the shape \[2, 2, 3\]"),
    ],
)
def test_what_does_not_fit_is_one_sentence(prediction, label, sentence):
    with pytest.raises(DataError, match=sentence):
        segmentation_scores(prediction, label, num_classes=4)
