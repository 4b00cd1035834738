"""Augmentation and mixing against timm, torchvision, open_clip and the recipes' own definitions."""

import pickle
import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image, ImageFilter, ImageOps
from timm.data import Mixup, RandomResizedCropAndInterpolation
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms

from vitreg_hub.errors import RecipeError
from vitreg_hub.training.data.augment import build_augment
from vitreg_hub.training.distributed.randomness import seed_of, seeded
from vitreg_hub.training.recipes.settings import CropAugment, MultiCrop, ThreeAugment
from vitreg_hub.training.tasks.supervised.settings import Supervised
from vitreg_hub.training.tasks.supervised.task import mix

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALIZE = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
KINDS = [
    CropAugment(scale=(0.08, 1.0), hflip=0.5, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5),
    ThreeAugment(),
    ThreeAugment(crop="src"),
    MultiCrop(local_size=16, num_local=3),
]


def built(settings, *, img_size=32, mean=MEAN, std=STD, interpolation="bicubic"):
    return build_augment(settings, img_size=img_size, mean=mean, std=std, interpolation=interpolation)


def in_pixels(settings, **how):
    """A transform whose views have values from 0 to 255."""
    return built(settings, mean=(0, 0, 0), std=(1 / 255,) * 3, **how)


def views(augment, image, *key):
    with seeded(*key):
        return augment(image)


def picture(width=50, height=40):
    """Random coarse structure, so that blur, crops and mirror images all show."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def assert_equal_draws(augment, oracle, image, count):
    for key in range(count):
        got = views(augment, image, key)
        with seeded(key):
            wanted = oracle(image)
        assert len(got) == len(wanted)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), key


# --- randomness


def test_seeded_draws_by_key_and_leaves_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with seeded(1, 2):
        first = draw()
        with seeded(3):
            draw()
        second = draw()
    with pytest.raises(ZeroDivisionError), seeded(1, 2):
        assert (draw(), draw(), 1 / 0) == (first, second)
    with seeded(2, 1):
        assert not set(draw()) & set(first)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_every_key_has_a_seed_of_its_own():
    keys = [key for length in (1, 2, 3) for key in product((0, 1, 2, 5, 2**31, 2**32 - 1), repeat=length)]
    seeds = {seed_of(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert {seed_of(*key) for key in keys} == seeds
    assert 0 <= min(seeds) < 2**62 < max(seeds) < 2**64


# --- all kinds


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_small_images_seeds_and_other_processes(settings):
    augment = built(settings)
    again = pickle.loads(pickle.dumps(augment))
    sizes = [32, 32, 16, 16, 16] if isinstance(settings, MultiCrop) else [32]
    for image in (picture(8, 8), picture(5, 11), picture(200, 90)):
        got = views(augment, image, 7)
        assert [tuple(view.shape) for view in got] == [(3, size, size) for size in sizes]
        assert all(view.dtype == torch.float32 and view.isfinite().all() for view in got)
        assert all(torch.equal(a, b) for a, b in zip(got, views(again, image, 7), strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(got, views(augment, image, 8), strict=True))


@pytest.mark.parametrize(
    "settings",
    [CropAugment(), MultiCrop(local_size=16, num_local=1, color_jitter=0, gray=0, blur=(0, 0, 0), solarize=0)],
    ids=str,
)
def test_normalisation(settings):
    color = (200, 100, 50)
    wanted = torch.tensor([(c / 255 - m) / s for c, m, s in zip(color, MEAN, STD, strict=True)])
    for view in built(settings)(Image.new("RGB", (40, 30), color)):
        torch.testing.assert_close(view, wanted[:, None, None].expand_as(view), rtol=0, atol=1e-6)


# --- crops


def test_crops_are_open_clips():
    settings = CropAugment(scale=(0.4, 0.8), ratio=(0.5, 1.5), erasing=0.5)
    config = {"use_timm": True, "scale": settings.scale, "ratio": settings.ratio, "re_prob": settings.erasing}
    oracle = image_transform(32, is_train=True, mean=MEAN, std=STD, interpolation="bicubic", aug_cfg=config)
    assert_equal_draws(built(settings), lambda image: (oracle(image),), picture(), 20)


def test_rand_augment_is_timms_between_crop_and_normalisation():
    config = "rand-m7-n3-mstd1"
    how = {
        "translate_const": 14,  # 45 % of 32
        "img_mean": tuple(round(255 * m) for m in MEAN),
        "interpolation": Image.Resampling.BILINEAR,
    }
    crop = RandomResizedCropAndInterpolation(32, scale=(0.5, 1.0), interpolation="bilinear")
    flip, policy = transforms.RandomHorizontalFlip(0.3), rand_augment_transform(config, how)
    oracle = transforms.Compose([crop, flip, policy, *NORMALIZE])
    augment = built(CropAugment(scale=(0.5, 1.0), hflip=0.3, rand_augment=config), interpolation="bilinear")
    assert_equal_draws(augment, lambda image: (oracle(image),), picture(), 30)


@pytest.mark.parametrize("config", ["v0", "random", "rand-x9", "rand-m9.5"])
def test_rand_augment_that_timm_does_not_read(config):
    with pytest.raises(RecipeError, match=f"rand_augment is '{config}'.*give something like rand-m9"):
        built(CropAugment(rand_augment=config))


# --- 3-Augment


def solarized(image):
    return ImageOps.solarize(image)


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


@pytest.mark.parametrize("crop", ["rrc", "src"])
def test_three_augment_is_deit3s(crop):
    if crop == "rrc":
        cut = RandomResizedCropAndInterpolation(32, scale=(0.08, 1.0), interpolation="bicubic")
    else:
        resize = transforms.Resize(32, transforms.InterpolationMode.BICUBIC)
        cut = transforms.Compose([resize, transforms.RandomCrop(32, padding=4, padding_mode="reflect")])
    flip, jitter, normalize = (
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.3, 0.3, 0.3),
        transforms.Compose(NORMALIZE),
    )

    def oracle(image):
        image = flip(cut(image))
        one = random.choice([solarized, transforms.Grayscale(3), blurred])  # timm's order; upstream puts grey first
        return (normalize(jitter(one(image))),)

    assert_equal_draws(built(ThreeAugment(crop=crop)), oracle, picture(), 40)


def test_three_augment_takes_exactly_one_of_three():
    augment = in_pixels(ThreeAugment(color_jitter=0))
    image, seen = Image.new("RGB", (40, 40), (200, 100, 50)), Counter()
    for key in range(600):
        (view,) = views(augment, image, key)
        seen[tuple(view[:, 0, 0].round().int().tolist())] += 1
    grey, solarised, blurred_or_nothing = (124, 124, 124), (55, 100, 50), (200, 100, 50)
    assert set(seen) == {grey, solarised, blurred_or_nothing}
    assert all(abs(count - 200) < 4 * (600 * 2 / 9) ** 0.5 for count in seen.values())


# --- multi-crop


def test_multi_crop_is_dinov2s():
    """With upstream's own (inverted) blur probabilities handed to torchvision: crops 0, 0.9, 0.5."""
    cubic = transforms.InterpolationMode.BICUBIC

    def one(size, scale, *extra):
        jitter = transforms.RandomApply(
            [transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8
        )
        geometry = [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=cubic),
            transforms.RandomHorizontalFlip(p=0.5),
        ]
        return transforms.Compose([*geometry, jitter, transforms.RandomGrayscale(p=0.2), *extra, *NORMALIZE])

    def blur(p):
        return transforms.RandomApply([transforms.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=1 - p)

    never, solarize = transforms.RandomSolarize(threshold=128, p=0), transforms.RandomSolarize(threshold=128, p=0.2)
    crops = [one(32, (0.32, 1.0), blur(1.0), never), one(32, (0.32, 1.0), blur(0.1), solarize)]
    crops += [one(16, (0.05, 0.32), blur(0.5), never)] * 3
    augment = built(MultiCrop(local_size=16, num_local=3))
    assert_equal_draws(augment, lambda image: tuple(crop(image) for crop in crops), picture(90, 70), 20)


def test_multi_crop_draws_its_areas():
    plain = MultiCrop(local_size=24, num_local=4, color_jitter=0, gray=0, blur=(0, 0, 0), solarize=0)
    augment, side = in_pixels(plain, img_size=48), 256
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    places = Image.fromarray(np.stack([across, down, across * 0], axis=-1).astype(np.uint8))
    areas, ratios = ([], []), []
    for key in range(100):
        for i, view in enumerate(views(augment, places, key)):
            size = view.shape[-1]
            rows, columns = view[1, :, size // 2], view[0, size // 2]  # middles of pixels, so one pixel short
            width, height = ((at.max() - at.min()).item() * size / (size - 1) for at in (columns, rows))
            areas[i >= 2].append(width * height / side**2)
            ratios.append(width / height)
    for got, (low, high) in zip(areas, (plain.global_scale, plain.local_scale), strict=True):
        spread = 0.1 * (high - low)
        assert low - 0.02 < min(got) < low + spread
        assert high - spread < max(got) < high + 0.02
    assert 0.70 < min(ratios) < 0.80
    assert 1.25 < max(ratios) < 1.40


def test_multi_crop_applies_each_colour_change_as_often_as_it_says(monkeypatch):
    """Jitter and blur leave marks instead, so that every view tells what was done to it."""

    def jitter(self, image):
        return Image.new("RGB", image.size, marked)

    def blur(self, image):
        image = image.copy()
        image.putpixel((0, 0), (0, 0, 0))
        return image

    monkeypatch.setattr(transforms.ColorJitter, "forward", jitter)
    monkeypatch.setattr(transforms.GaussianBlur, "forward", blur)
    original, marked = (200, 150, 100), (190, 150, 100)
    done = {}
    for did in product((False, True), repeat=3):
        image = Image.new("RGB", (1, 1), marked if did[0] else original)
        image = image.convert("L").convert("RGB") if did[1] else image
        done[(solarized(image) if did[2] else image).getpixel((0, 0))] = did
    assert len(done) == 8

    count = 400
    settings = MultiCrop(local_size=16, num_local=2)
    augment = in_pixels(settings)
    seen = np.zeros((4, 4))  # views; jitter, grey, solarised, blurred
    for key in range(count):
        for i, view in enumerate(views(augment, Image.new("RGB", (40, 40), original), key)):
            did = done[tuple(view[:, -1, -1].round().int().tolist())]
            seen[i] += [*did, not view[:, 0, 0].any()]
    wanted = np.array([[0.8, 0.2, 0, 0], [0.8, 0.2, 0.2, 0.9], [0.8, 0.2, 0, 0.5], [0.8, 0.2, 0, 0.5]])
    assert (np.abs(seen / count - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / count)).all(), seen / count


# --- mixing


def batch(count=8, classes=10):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, 12, 16, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


BOTH = Supervised(loss="ce", mixup=0.8, cutmix=1.0, smoothing=0.1, mix_probability=0.9, switch_probability=0.4)


@pytest.mark.parametrize("settings", [BOTH, Supervised(mixup=0.2), Supervised(cutmix=1.0)], ids=["both", "mix", "cut"])
def test_mixing_is_timms_and_takes_nothing_from_the_outside(settings):
    images, labels = batch()
    kept = images.clone()
    timms = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        prob=settings.mix_probability,
        switch_prob=settings.switch_probability,
        label_smoothing=settings.smoothing,
        num_classes=10,
    )
    seen = set()
    for step in range(20):
        np.random.seed(step)  # what others draw has no say
        got, targets = mix(images, labels, settings=settings, num_classes=10, seed=5, step=step)
        np.random.seed(seed_of(5, step) % 2**32)
        wanted, wanted_targets = timms(images.clone(), labels)
        assert torch.equal(got, wanted)
        assert torch.equal(targets, wanted_targets)
        seen.add(got[0].sum().item())
    assert len(seen) > 15
    assert torch.equal(images, kept)


def test_a_batch_mixed_at_once_is_its_halves_mixed_apart():
    images, labels = batch()
    for step in range(12):
        how = {"settings": BOTH, "num_classes": 10, "seed": 1, "step": step}
        whole = mix(images, labels, **how)
        for part in ([0, 1, 6, 7], [2, 3, 4, 5]):
            assert all(
                torch.equal(a, b[part]) for a, b in zip(mix(images[part], labels[part], **how), whole, strict=True)
            )


def test_targets_are_what_the_pixels_say():
    """Images as flat as their labels: half of the batch black, of class 0, the other white, of class 1."""
    images = torch.tensor([0.0] * 3 + [1.0] * 3)[:, None, None, None].expand(6, 3, 20, 20)
    labels = torch.tensor([0] * 3 + [1] * 3)
    kinds = Counter()
    for step in range(200):
        got, targets = mix(images, labels, settings=BOTH, num_classes=2, seed=0, step=step)
        white = got.mean((1, 2, 3))
        torch.testing.assert_close(targets[:, 1], white * 0.9 + 0.05, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        kinds["none" if got.equal(images) else "cut" if set(got.unique().tolist()) == {0.0, 1.0} else "mix"] += 1
    assert abs(kinds["mix"] - 200 * 0.9 * 0.6) < 4 * (200 * 0.54 * 0.46) ** 0.5
    assert kinds["cut"] > 40
    assert kinds["none"] > 5


def test_no_mixing_gives_plain_or_smoothed_targets():
    images, labels = batch(count=5)
    got, targets = mix(images, labels, settings=Supervised(), num_classes=10, seed=0, step=0)
    assert torch.equal(got, images)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 10).float())
    _, targets = mix(images, labels, settings=Supervised(loss="ce", smoothing=0.1), num_classes=10, seed=0, step=0)
    logits = torch.randn(5, 10)
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), wanted)


def test_an_odd_share_cannot_be_mixed():
    images, labels = batch(count=3)
    with pytest.raises(RecipeError, match=r"3 images at a time.*choose a batch_size"):
        mix(images, labels, settings=BOTH, num_classes=10, seed=0, step=0)


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: type(settings).__name__)
def test_views_of_one_channel_are_grey(settings):
    transform = build_augment(settings, img_size=32, mean=MEAN, std=STD, interpolation="bicubic", in_chans=1)
    picture = Image.effect_noise((48, 48), 60).convert("RGB")
    with seeded(0):
        views = transform(picture)
    with seeded(0):
        colours = built(settings)(picture)
    assert len(views) == len(colours)
    for view, colour in zip(views, colours, strict=True):
        assert torch.allclose(view, colour.mean(0, keepdim=True), atol=1e-6)
