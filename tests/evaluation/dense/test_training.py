"""Heads are trained on planted features, and scored."""

import numpy as np
import pytest
import torch
from dense_golden import case
from dense_pictures import MEAN, STD, Annotated, Source, colour_reader, patches_of_colour
from PIL import Image
from torch import distributed, nn

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.augment import View, depth_view, segmentation_view, sides
from vitreg_hub.evaluation.dense.heads import SegmentationHead
from vitreg_hub.evaluation.dense.loading import Workers
from vitreg_hub.evaluation.dense.scoring import evaluate_depth, evaluate_segmentation
from vitreg_hub.evaluation.dense.training import train_depth, train_segmentation

SHORT = dict(mean=MEAN, std=STD, batch_size=4, warmup=2)


def uniform(number: int, *, seed: int = 0) -> Source:
    """Pictures of one colour each."""
    pictures = []
    for picture in patches_of_colour(number, grid=(1, 1), seed=seed).pictures:
        mask, depth = (values.repeat(4, axis=0).repeat(4, axis=1) for values in (picture.mask, picture.depth))
        pictures.append(Annotated(name=picture.name, image=picture.image.resize((64, 64)), mask=mask, depth=depth))
    return Source(pictures=tuple(pictures))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return colour_reader()


@pytest.fixture(scope="module")
def head(model) -> SegmentationHead:
    return train_segmentation(model, uniform(16), crop=64, steps=20, lr=0.05, augment=False, **SHORT)


def test_classes_that_patches_tell_are_found(head):
    result = evaluate_segmentation(head, uniform(12, seed=1), crop=64, examples=2)
    assert result.scores.mean_iou == result.scores.accuracy == 1
    assert len(result.counts.areas) == 12
    assert [example.name for example in result.examples] == ["picture 0", "picture 1"]
    assert np.array_equal(result.examples[0].predicted, result.examples[0].truth)
    assert head.settings.class_names == ("red", "green", "blue", "yellow")
    checkered = evaluate_segmentation(head, patches_of_colour(4, grid=(4, 6)), crop=64, flip=True, scales=(1, 1.25))
    assert 0.5 < checkered.scores.mean_iou < 1


def test_permuted_labels_score_at_chance(head):
    rng = np.random.default_rng(0)
    pictures = patches_of_colour(40).pictures
    masks = np.stack([picture.mask for picture in pictures])
    masks = rng.permutation(masks.ravel()).reshape(masks.shape)
    moved = [
        Annotated(name=picture.name, image=picture.image, mask=mask)
        for picture, mask in zip(pictures, masks, strict=True)
    ]
    score = evaluate_segmentation(head, Source(pictures=tuple(moved)), crop=64).scores
    assert score.accuracy == pytest.approx(1 / 4, abs=0.02)
    assert score.mean_iou == pytest.approx(1 / 7, abs=0.02)


def test_depth_that_patches_tell_is_found(model):
    head = train_depth(model, uniform(16), bins=32, steps=150, lr=0.05, augment=False, warm_steps=5, **SHORT)
    result = evaluate_depth(head, uniform(8, seed=1), examples=1)
    assert result.scores.a1 == 1
    assert result.scores.abs_rel < 0.1
    assert result.examples[0].predicted.shape == (64, 64)
    assert len(result.errors.values) == 8


@pytest.mark.parametrize("augment", [False, True])
def test_a_seed_decides_all_whoever_computes(model, augment):
    source = patches_of_colour(6)

    def weights(seed: int, num_workers: int = 0) -> torch.Tensor:
        workers = Workers(num_workers=num_workers)
        torch.rand(1)  # nothing else may matter
        head = train_segmentation(model, source, crop=64, steps=3, seed=seed, augment=augment, workers=workers, **SHORT)
        return head.conv.weight

    before = torch.get_rng_state()
    first = weights(0)
    torch.set_rng_state(before)
    assert torch.equal(first, weights(0, num_workers=1))
    assert not torch.equal(first, weights(1))


def test_pictures_that_cannot_be_used_are_one_sentence(model, head):
    good = patches_of_colour(1)[0]
    wrong = good.mask.copy()
    wrong[0, 0] = 7
    cases = {
        "picture 0 has no mask": Annotated(name="picture 0", image=good.image),
        "the mask of picture 0 has 64 x 32 pixels, but the picture has 64 x 64": Annotated(
            name="picture 0", image=good.image, mask=good.mask[:32]
        ),
        "the mask of picture 0 has the label 7, but there are 4 classes": Annotated(
            name="picture 0", image=good.image, mask=wrong
        ),
    }
    for sentence, picture in cases.items():
        source = Source(pictures=(picture,))
        with pytest.raises(DataError, match=sentence):
            train_segmentation(model, source, crop=64, steps=1, **SHORT)
        for num_workers in (0, 1):
            with pytest.raises(DataError, match=sentence):
                evaluate_segmentation(head, source, workers=Workers(num_workers=num_workers))
    with pytest.raises(DataError, match="give num_classes"):
        train_segmentation(model, Source(pictures=(good,), class_names=None), crop=64, steps=1, **SHORT)
    with pytest.raises(DataError, match="steps is 0"):
        train_segmentation(model, Source(pictures=(good,)), crop=64, steps=0, **SHORT)
    with pytest.raises(DataError, match="no pictures to train on"):
        train_segmentation(model, Source(pictures=()), crop=64, steps=1, **SHORT)
    small = Annotated(name="small", image=good.image.resize((32, 32)), depth=good.depth[:32, :32])
    with pytest.raises(DataError, match="give input_size"):
        train_depth(model, Source(pictures=(good, small)), augment=False, steps=1, **SHORT)


def test_views_keep_pictures_and_values_together():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    view = View(image=Image.fromarray(ramp).convert("RGB"), values=ramp.astype(np.int64), unknown=255)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        part = depth_view(view, rng, crop=(48, 64))
        assert part.values.shape == (48, 64)
        known = (part.values != 255) & (part.values > 5)
        brightness = np.asarray(part.image)[..., 0]
        assert np.corrcoef(brightness[known], part.values[known])[0, 1] > 0.9
        part = segmentation_view(view, rng, crop=64)
        image, values = part.tensors(64, 64, mean=MEAN, std=STD)
        assert image.shape == (3, 64, 64)
        assert values.shape == (64, 64)
        assert part.image.size == part.values.shape[::-1]
        rows, columns = part.values.shape
        assert (values[rows:] == 255).all()
        assert (values[:, columns:] == 255).all()
    assert view.mirrored().values[0, 0] == 199


def test_sizes_are_the_official_ones():
    for height, width, short, *size in case("eval_segmentation_transforms")[1]["resize_table"].tolist():
        assert sides(height, width, short=short) == tuple(size)


def two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    model, source = colour_reader(), patches_of_colour(5)
    for workers in (Workers(rank=rank, world_size=2), Workers()):
        for augment in (False, True):
            head = train_segmentation(
                model, source, crop=64, steps=3, augment=augment, workers=workers, **SHORT | {"batch_size": 3}
            )
            result = evaluate_segmentation(head, source, crop=64, workers=workers, examples=3)
            found.append((head.conv.weight, result))
    for (weight, result), (alone, expected) in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(weight, alone, rtol=1e-4, atol=1e-6)
        assert len(result.counts.areas) == 5
        assert abs(result.scores.mean_iou - expected.scores.mean_iou) < 1e-3
        assert [example.name for example in result.examples] == [f"picture {index}" for index in range(3)]
    unusable = Source(pictures=(*source.pictures[:4], Annotated(name="picture 4", image=source[4].image)))
    with pytest.raises(DataError, match="picture 4 has no mask"):  # in both, though only one reads it
        evaluate_segmentation(head, unusable, crop=64, workers=Workers(rank=rank, world_size=2))
    distributed.destroy_process_group()


def test_processes_share_the_work(tmp_path):
    torch.multiprocessing.spawn(two_processes, args=(str(tmp_path),), nprocs=2)
