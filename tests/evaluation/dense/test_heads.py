"""Heads beside their models: what belongs to them, what they read, how they are saved."""

import json

import pytest
import torch
from dense_pictures import MEAN, STD, colour_reader
from models import random_bundle
from safetensors import safe_open
from torch import nn

from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.evaluation.dense.depth_head import DepthHead
from vitreg_hub.evaluation.dense.features import dense_features
from vitreg_hub.evaluation.dense.heads import SegmentationHead
from vitreg_hub.evaluation.dense.losses import pixel_cross_entropy, silog_loss
from vitreg_hub.evaluation.dense.windows import by_windows, corners
from vitreg_hub.tokens import observe


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return colour_reader(dynamic_img_size=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 80, generator=torch.Generator().manual_seed(0))


def drawn(head: nn.Module) -> nn.Module:
    """The head with statistics and weights at which nothing can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return head.eval()


def test_the_model_is_no_part_of_its_head(model, images):
    model.train()
    head = SegmentationHead(model, num_classes=5)
    assert set(head.state_dict()) == {
        *("conv.weight", "conv.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"),
        "norm.num_batches_tracked",
    }
    head(images).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    head.eval()
    assert model.training
    model.eval()


def test_features_are_the_tokens_of_the_blocks(model, images):
    seen = observe(model, images, normed_blocks=(0, 2), blocks=(0, 2))
    found = dense_features(model, images, blocks=(0, 2), use_cls=True, use_registers=True)
    parts = found.split(32, dim=1)
    for place, block in ((0, 0), (3, 2)):
        tokens = seen.normed_blocks[block]
        assert torch.equal(parts[place].flatten(2).transpose(1, 2), tokens.patches)
        assert torch.equal(parts[place + 1][:, :, 1, 2], tokens.cls[:, 0])
        assert torch.equal(parts[place + 2][:, :, 3, 0], tokens.registers.mean(dim=1))
    raw = dense_features(model, images, blocks=(2,), normed=False)
    assert torch.equal(raw.flatten(2).transpose(1, 2), seen.tokens[2].patches)


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_saved_heads_load_with_what_they_said(kind, model, images, tmp_path):
    common = dict(blocks=[0, -1], use_cls=True, mean=MEAN, std=STD)
    if kind == "segmentation":
        head = SegmentationHead(model, num_classes=3, class_names=("a", "b", "c"), **common)
    else:
        head = DepthHead(model, bins=16, max_depth=80, spacing="sid", weights="softmax", upsample=2, **common)
    file = drawn(head).save(tmp_path / "head.safetensors")
    loaded = type(head).load(file, model)
    assert loaded.settings == head.settings
    assert not loaded.training
    assert torch.equal(loaded.predict(images), head.predict(images))
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["vitreg_head"])["fits"] == {"width": 32, "blocks": 3, "patch": [16, 16]}
    with pytest.raises(BundleError, match="exists"):
        head.save(file)


def test_a_head_that_does_not_fit_is_one_sentence(model, tmp_path):
    file = SegmentationHead(model, num_classes=3).save(tmp_path / "head.safetensors")
    other = random_bundle().build()
    sentence = r"is for a model with 3 blocks, 32 channels and patches of 16 x 16 pixels, but this one has"
    with pytest.raises(DataError, match=sentence):
        SegmentationHead.load(file, other)
    with pytest.raises(BundleError, match=r"holds a SegmentationHead, so load it with SegmentationHead.load\(\)"):
        DepthHead.load(file, model)
    with pytest.raises(BundleError, match="is not a file"):
        SegmentationHead.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("no head")
    with pytest.raises(BundleError, match="cannot be read"):
        SegmentationHead.load(tmp_path / "text", model)
    random_bundle().save(tmp_path / "bundle")
    with pytest.raises(BundleError, match="holds no head"):
        SegmentationHead.load(tmp_path / "bundle" / "model.safetensors", model)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda model: SegmentationHead(model, num_classes=0), "num_classes is 0"),
        (lambda model: SegmentationHead(model, num_classes=3, class_names=("a",)), "1 classes have names"),
        (lambda model: SegmentationHead(model, num_classes=3, blocks=(3,)), "block 3 does not exist"),
        (lambda model: SegmentationHead(model, num_classes=3, fit="crop"), "fit is 'crop'"),
        (lambda model: DepthHead(model, min_depth=5, max_depth=1), "min_depth is 5 and max_depth is 1"),
        (lambda model: DepthHead(model, bins=1, weights="softmax"), "for 1 bin, which is regression"),
        (lambda model: DepthHead(model).predict(torch.zeros(4)), r"not \[4\]"),
        (lambda model: DepthHead(model).predict(torch.zeros(3, 64, 64), crop=32, stride=33), "pixels would be left"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make, sentence, model):
    with pytest.raises(DataError, match=sentence):
        make(model)


def test_windows_cover_a_picture_and_are_averaged():
    places = corners((50, 37), crop=(32, 32), stride=21)
    assert places == [(0, 0), (0, 5), (18, 0), (18, 5)]
    images = torch.randn(2, 3, 50, 37)
    torch.testing.assert_close(by_windows(lambda x: 2 * x, images, crop=32, stride=21), 2 * images)
    shapes = []
    by_windows(lambda x: shapes.append(x.shape) or x, images[:, :, :20, :24], crop=32, stride=None)
    assert {tuple(shape[2:]) for shape in shapes} == {(20, 20)}


def test_one_image_and_a_batch_are_predicted_alike(model, images):
    head = drawn(SegmentationHead(model, num_classes=5))
    batch = head.maps(images, crop=48)
    for image, maps in zip(images, batch, strict=True):
        torch.testing.assert_close(head.maps(image, crop=48)[0], maps, rtol=1e-5, atol=1e-5)
    assert head.predict(images, size=(7, 9)).shape == (2, 7, 9)


def test_losses_without_a_known_pixel_are_zero():
    logits, depth = torch.randn(1, 3, 4, 4, requires_grad=True), torch.rand(1, 1, 4, 4, requires_grad=True)
    assert pixel_cross_entropy(logits, torch.full((1, 4, 4), 255)) == 0
    for warm in (False, True):
        assert silog_loss(depth, torch.zeros(1, 1, 4, 4), warm=warm) == 0
