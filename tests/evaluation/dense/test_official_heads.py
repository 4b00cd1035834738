"""Heads with the official weights give what the official code gave."""

import pytest
import torch
from dense_golden import below, case, dinov2, dinov3

from vitreg_hub.evaluation.dense.depth_head import DepthHead, DepthSettings, depth_of
from vitreg_hub.evaluation.dense.depth_metrics import METRICS, DepthErrors
from vitreg_hub.evaluation.dense.features import dense_features, fitted
from vitreg_hub.evaluation.dense.heads import SegmentationHead
from vitreg_hub.evaluation.dense.losses import gradient_loss, silog_loss
from vitreg_hub.evaluation.dense.maps import resized
from vitreg_hub.evaluation.dense.segmentation_metrics import SegmentationCounts

BLOCKS = {"last": (3,), "four_last": (0, 1, 2, 3)}
LABEL_SIZES = [(33, 47), (70, 41), (24, 30)]


def close(ours, official, *, atol=2e-5):
    torch.testing.assert_close(ours, official, rtol=0, atol=atol)


def with_weights(head, weights, *, norm=None, conv):
    """The head with the tensors of an official one."""
    if norm:
        head.norm.load_state_dict(below(f"{norm}.", weights))
    head.conv.load_state_dict(below(f"{conv}.", weights))
    return head.eval()


def dinov3_segmentation(blocks):
    inputs, expected, weights = case("eval_segmentation")
    model = dinov3(below("segmentation_model.0.feature_model.", weights))
    head = SegmentationHead(model, num_classes=6, blocks=BLOCKS[blocks], fit="cut")
    head = with_weights(head, below(f"{blocks}:segmentation_model.1.", weights), norm="batchnorm_layer", conv="conv")
    return head, inputs, below(f"{blocks}.", expected)


@pytest.mark.parametrize("blocks", BLOCKS)
@torch.no_grad()
def test_segmentation_of_dinov3(blocks):
    head, inputs, expected = dinov3_segmentation(blocks)
    image = inputs["image_0"]
    features = [expected[f"image_0.features.{i}"] for i in range(len(BLOCKS[blocks]))]
    close(dense_features(head.model, image, blocks=BLOCKS[blocks]), torch.cat(features, dim=1))
    close(head(image), expected["image_0.head_logits"])
    close(head.maps(image, size=LABEL_SIZES[0]), expected["image_0.predict"])
    counts = []
    for i, size in enumerate(LABEL_SIZES):
        image, label = inputs[f"image_{i}"], inputs[f"label_{i}"]
        if f"image_{i}.slide" in expected:
            close(head.maps(image, crop=32, stride=21), expected[f"image_{i}.slide"])
        prediction = head.predict(image, crop=32, stride=21, size=size)[0]
        assert torch.equal(prediction, expected[f"image_{i}.prediction"].long())
        for reduce in (False, True):
            counts.append(SegmentationCounts.of(prediction, label, num_classes=6, reduce_zero_label=reduce))
            found, predicted, true = counts[-1].areas[0]
            areas = torch.stack([found, predicted + true - found, predicted, true]).float()
            assert torch.equal(areas, expected[f"image_{i}.areas.reduce_zero_{reduce}"])
    scores = SegmentationCounts.together(counts[1::2]).scores()
    official = expected["eval.mIoU"], expected["eval.aAcc"], expected["eval.acc"]
    ours = scores.mean_iou, scores.accuracy, scores.mean_accuracy
    assert [round(100 * value, 2) for value in ours] == [value.item() for value in official]


@torch.no_grad()
def test_whole_images_of_dinov3():
    head, inputs, expected = dinov3_segmentation("last")
    maps = head.maps(inputs["image_0"], size=LABEL_SIZES[0], input_size=(512, 512))
    close(maps, expected["image_0.whole"])


@pytest.mark.parametrize("blocks", BLOCKS)
@torch.no_grad()
def test_views_of_dinov3(blocks):
    head, inputs, expected = dinov3_segmentation(blocks)
    counts = []
    for i, size in enumerate(LABEL_SIZES):
        views = [inputs[f"image_{i}"], inputs[f"image_{i}.scaled"]]
        found = [head.probabilities(view, crop=32, stride=21, size=size, flip=True) for view in views]
        counts.append(
            SegmentationCounts.of(
                sum(found).argmax(dim=1)[0], inputs[f"label_{i}"], num_classes=6, reduce_zero_label=True
            )
        )
    scores = SegmentationCounts.together(counts).scores()
    assert round(100 * scores.mean_iou, 2) == expected["eval_tta.mIoU"].item()
    assert round(100 * scores.accuracy, 2) == expected["eval_tta.aAcc"].item()


@pytest.mark.parametrize(("name", "blocks"), [("linear", (-1,)), ("ms", (0, 1, 2, 3))])
@torch.no_grad()
def test_segmentation_of_dinov2(name, blocks, tmp_path):
    inputs, expected, weights = case("eval_segmentation_dinov2")
    head = SegmentationHead(dinov2(below("backbone.", weights), tmp_path), num_classes=5, blocks=blocks)
    head = with_weights(head, below(f"{name}:decode_head.", weights), norm="bn", conv="conv_seg")
    close(head(inputs["image_0"]), expected[f"{name}.image_0.head"])
    close(head.maps(inputs["image_0"]), expected[f"{name}.image_0.whole"])
    for i in (0, 1):
        close(head.maps(inputs[f"image_{i}"], crop=28, stride=17), expected[f"{name}.image_{i}.slide"])


def test_sizes_that_the_patch_does_not_divide():
    inputs, expected, _ = case("eval_depth")
    assert torch.equal(fitted(inputs["image_0"], (8, 8), fit="pad"), expected["center_padding_8"])
    close(fitted(inputs["image_0"], (8, 8), fit="resize"), expected["stretch_8"])


DEPTH_OF_DINOV3 = {
    "linear_last": {},
    "linear_four_cls": dict(blocks=range(4), normed=False, batchnorm=False, use_cls=True),
}


@pytest.mark.parametrize("name", DEPTH_OF_DINOV3)
@torch.no_grad()
def test_depth_of_dinov3(name):
    inputs, expected, weights = case("eval_depth")
    expected, weights_of_head = below(f"{name}.", expected), below(f"{name}:decoder.", weights)
    head = DepthHead(dinov3(below("encoder.backbone.", weights)), bins=12, **DEPTH_OF_DINOV3[name])
    norm = "batchnorm_layer" if head.settings.batchnorm else None
    with_weights(head, weights_of_head, norm=norm, conv="conv_depth")
    for i in (0, 1):
        close(head(inputs[f"image_{i}"]), expected[f"image_{i}.depth"], atol=1e-4)
    official_names = {"log10": "log_10"}
    for crop, flip, align in [(c, f, a) for c in ("FULL", "NYU_EIGEN") for f in (False, True) for a in (False, True)]:
        errors = []
        for i in (0, 1):
            target = inputs[f"depth_{i}"][0, 0]
            prediction = head.predict(inputs[f"image_{i}"], flip=flip, size=tuple(target.shape))[0]
            chosen = {"FULL": None, "NYU_EIGEN": "nyu_eigen"}[crop]
            errors.append(DepthErrors.of(prediction, target, crop=chosen, align=align))
        found = DepthErrors.together(errors).values.float()
        for metric, ours in zip(METRICS, found.unbind(1), strict=True):
            official = expected[f"eval.{crop}.tta_{flip}.align_{align}.{official_names.get(metric, metric)}"]
            torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-6, msg=f"{metric} {crop} {flip} {align}")


@pytest.mark.parametrize(("name", "blocks"), [("layers1", (-1,)), ("layers4", range(4))])
@torch.no_grad()
def test_depth_of_dinov2(name, blocks, tmp_path):
    inputs, expected, weights = case("eval_depth_dinov2")
    model = dinov2(below("backbone.", weights), tmp_path)
    settings = dict(bins=16, max_depth=80, normed=False, batchnorm=False, use_cls=True, upsample=4)
    head = with_weights(
        DepthHead(model, blocks=blocks, **settings), below(f"{name}:decode_head.", weights), conv="conv_depth"
    )
    for i in (0, 1):
        close(head(inputs[f"image_{i}"]), expected[f"{name}.image_{i}.head"], atol=1e-4)
        close(head.predict(inputs[f"image_{i}"]), expected[f"{name}.image_{i}.depth"][:, 0], atol=1e-4)
    slid = head.predict(inputs["image_1"], crop=24, stride=15)
    close(slid, expected[f"{name}.image_1.slide"][:, 0], atol=1e-4)


@pytest.mark.parametrize("weights", ["linear", "softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("official", "spacing", "limits"),
    [
        ("dinov3.linear", "uniform", (1e-3, 10)),
        ("dinov3.log", "sid", (1e-3, 10)),
        ("dinov2.UD", "uniform", (1e-3, 10)),
        ("dinov2.SID", "dinov2_sid", (1e-3, 1.5)),
    ],
)
def test_depth_from_bins(official, spacing, limits, weights):
    inputs, expected = case("eval_depth_bins")[:2]
    settings = DepthSettings(spacing=spacing, weights=weights, min_depth=limits[0], max_depth=limits[1])
    close(depth_of(inputs["logits"], settings), expected[f"{official}.{weights}"])


def test_depth_from_regression():
    inputs, expected = case("eval_depth_bins")[:2]
    close(depth_of(inputs["regression"], DepthSettings()), expected["dinov3.regression"])
    close(depth_of(inputs["regression"], DepthSettings()), expected["dinov2.regression.scale_up_False"])
    scaled = depth_of(inputs["regression"], DepthSettings(weights="sigmoid"))
    close(scaled, expected["dinov2.regression.scale_up_True"])


@pytest.mark.parametrize("i", [0, 1])
def test_losses(i):
    inputs, expected = case("eval_depth_metrics")[:2]
    prediction, target = inputs[f"pred_{i}"], inputs[f"gt_{i}"]
    ours = {
        "sigloss": silog_loss(prediction, target),
        "sigloss.warm": silog_loss(prediction, target, warm=True),
        "gradient_log_loss": gradient_loss(prediction, target),
        "gradient_loss": gradient_loss(prediction, target, logarithmic=False),
    }
    for name, loss in ours.items():
        torch.testing.assert_close(loss, expected[f"{i}.{name}"], rtol=1e-5, atol=1e-5, msg=name)


def test_resizing_keeps_what_has_its_size():
    maps = torch.rand(1, 2, 3, 4)
    assert resized(maps, (3, 4)) is maps
