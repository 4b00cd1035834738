"""Norms and outliers: what is planted is found exactly, what has one mode is left alone."""

import dataclasses
import pickle

import numpy as np
import pytest
import timm
import torch
from models import randomised
from planted import planted

from vitreg_hub.analysis.measures import patch_norms
from vitreg_hub.analysis.meters.histogram import EDGES, bin_sums, bins_of, count_above, edges, packed, quantiles
from vitreg_hub.analysis.meters.norms import NormMeter
from vitreg_hub.analysis.meters.outliers import find_cutoff
from vitreg_hub.analysis.results import QUANTILES
from vitreg_hub.tokens import observe

ONE_MODE = {
    "lognormal": lambda rng, n: np.exp(rng.normal(3, rng.uniform(0.02, 1.5), n)),
    "gamma": lambda rng, n: rng.gamma(rng.uniform(0.3, 9), 10, n),
    "pareto": lambda rng, n: rng.pareto(rng.uniform(0.8, 4), n) + 0.1,
    "student": lambda rng, n: np.abs(rng.standard_t(2, n)) * 10,
    "uniform": lambda rng, n: rng.uniform(1, 100, n),
    "skewed": lambda rng, n: np.exp(rng.normal(3, 0.3, n) + rng.exponential(0.6, n)),
    "constant": lambda rng, n: np.full(n, 7.0),
    "zero": lambda rng, n: np.zeros(n),
}


def counted(norms: np.ndarray) -> np.ndarray:
    return bin_sums(bins_of(norms[None]))[0]


def cutoff_of(norms: np.ndarray):
    return find_cutoff(counted(norms))


@pytest.mark.parametrize("kind", ONE_MODE)
def test_one_mode_has_no_outliers(kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = cutoff_of(ONE_MODE[kind](rng, int(10 ** rng.uniform(2.8, 5))))
        assert (found.value, found.source) == (None, "none"), seed


def test_two_modes_are_told_apart():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        number = int(10 ** rng.uniform(4.2, 5))
        outliers = int(number * rng.uniform(0.01, 0.15))
        distance = rng.uniform(1.4, 3)  # between the means of log norms: ratio of 4 to 20
        norms = np.exp(np.concatenate([rng.normal(3, 0.2, number - outliers), rng.normal(3 + distance, 0.2, outliers)]))
        found = cutoff_of(norms)
        wrong = (norms[: number - outliers] > found.value).sum() + (norms[number - outliers :] <= found.value).sum()
        assert wrong <= 0.0005 * number, seed
        assert found.source == "found"
        assert found.outlier_weight == pytest.approx(outliers / number, rel=0.02)
        assert found.normal_norm == pytest.approx(np.exp(3), rel=0.02)
        assert found.outlier_norm == pytest.approx(np.exp(3 + distance), rel=0.05)
        assert found.separation == pytest.approx(distance / 0.2, rel=0.1)  # Ashman's D, by its definition


@pytest.mark.parametrize(
    ("share", "ratio", "why"),
    [(0.4, 10, "not the rare ones"), (0.0005, 10, "too rare"), (0.02, 1.7, "too close")],
)
def test_modes_that_are_no_outliers_are_left_alone(share, ratio, why):
    rng = np.random.default_rng(0)
    outliers = int(share * 100_000)
    norms = rng.normal(100, 3, 100_000)
    norms[:outliers] *= ratio
    assert cutoff_of(norms).value is None


def test_outliers_of_little_more_than_twice_the_norm_are_found():
    norms = np.random.default_rng(0).normal(100, 3, 100_000)
    norms[:2000] *= 2.3
    found = cutoff_of(norms)
    assert found.value == pytest.approx((norms[:2000].min() * norms[2000:].max()) ** 0.5, rel=0.02)  # midway
    assert found.outlier_norm == pytest.approx(np.exp(np.log(norms[:2000]).mean()), rel=1e-3)
    assert found.normal_norm == pytest.approx(np.exp(np.log(norms[2000:]).mean()), rel=1e-3)


def test_the_end_of_a_wide_mode_has_no_outliers():
    rng = np.random.default_rng(0)
    three = np.repeat([1.0, 64.0, 140.0], [30_000, 65_000, 5_000]) * np.exp(rng.normal(0, 0.02, 100_000))
    assert cutoff_of(three).value is None  # norms differ more below the cutoff than across it
    shoulder = [rng.normal(0, 0.1, 80_000), rng.uniform(0, 2.5, 14_000), rng.uniform(2.1, 2.9, 3_000)]
    assert cutoff_of(np.exp(np.concatenate(shoulder))).value is None  # the valley is hardly one


def test_few_patches_show_no_modes():
    found = cutoff_of(np.array([1.0] * 400 + [100.0] * 20))
    assert found.value is None
    assert "420 patch tokens are too few" in found.why


def test_histogram_is_numpys():
    norms = np.exp(np.random.default_rng(0).normal(0, 2, (3, 50_000))).astype(np.float32)
    norms[0, : len(EDGES) - 2] = EDGES[1:-1]  # on the edges, where rounding could go either way
    counts = bin_sums(bins_of(norms))
    for row, expected in zip(counts, norms, strict=True):
        # numpy's bins are closed on the other side
        assert np.array_equal(row, np.histogram(-expected.clip(EDGES[0], EDGES[-1]), -EDGES[::-1])[0][::-1])
    assert count_above(counts[0], EDGES[1000]) == (norms[0] > EDGES[1000]).sum()
    packed_counts = packed(counts[1])
    assert sum(packed_counts.counts) == 50_000
    first, last = edges(packed_counts)[[0, -1]]
    assert first <= norms[1].min() <= norms[1].max() <= last
    assert packed_counts.counts[0] > 0 < packed_counts.counts[-1]


def test_sums_of_bins_are_of_what_is_in_them():
    norms = np.array([[1.0, 30.0, 1.0], [30.0, 30.0, 2.0]], dtype=np.float32)
    sums = bin_sums(bins_of(norms), np.array([5.0, 7.0, 11.0]))
    at = bins_of(np.array([1.0, 2.0, 30.0]))
    assert sums[:, at].tolist() == [[16, 0, 7], [0, 11, 12]]


def test_a_norm_on_an_edge_is_not_above_it():
    assert count_above(counted(EDGES[[500, 1000, 1000, 1500]]), float(EDGES[1000])) == 1


def test_norms_beyond_the_bins_are_counted():
    assert counted(np.array([0.0, 1e-30, 1e30]))[[0, -1]].tolist() == [2, 1]


def test_quantiles_are_numpys_to_a_bin():
    norms = np.exp(np.random.default_rng(0).normal(2, 0.7, 20_000)).astype(np.float32)
    ours = quantiles(counted(norms), QUANTILES)
    assert np.allclose(ours[1:-1], np.quantile(norms, QUANTILES[1:-1]), rtol=0.012)
    far_apart = counted(np.array([1.0, 100.0]).repeat(10))
    assert quantiles(far_apart, (0.25, 0.75)) == pytest.approx([1, 100], rel=0.012)


@pytest.fixture(scope="module")
def vit():
    return randomised(timm.create_model("vit_nano_reg4", num_classes=0))


def test_norms_are_those_of_the_tokens(vit):
    images = torch.randn(10, 3, 32, 32)
    blocks = patch_norms(vit, images, batch_size=3)
    tokens = vit.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True)
    assert len(blocks) == len(tokens)
    for block, (patches, prefix) in zip(blocks, tokens, strict=True):
        norms = patches.detach().norm(dim=-1).numpy()
        assert block.mean == pytest.approx(norms.mean(), rel=1e-5)
        assert block.quantiles[0] == pytest.approx(norms.min(), rel=1e-6)
        assert block.quantiles[-1] == pytest.approx(norms.max(), rel=1e-6)
        assert np.allclose(block.quantiles, np.quantile(norms, QUANTILES), rtol=0.02)
        assert sum(block.histogram.counts) == norms.size
        mean_prefix = prefix.detach().norm(dim=-1).mean(0).numpy()
        assert np.allclose(block.class_norms + block.register_norms, mean_prefix, rtol=1e-5)
        assert (len(block.class_norms), len(block.register_norms)) == (1, 4)


def test_a_given_cutoff_is_exact_and_holds_for_every_block(vit):
    images = torch.randn(6, 3, 32, 32)
    tokens = vit.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    cutoff = float(tokens[1].norm(dim=-1).median())  # lies on no edge of the bins
    blocks = patch_norms(vit, images, cutoff=cutoff, batch_size=4)
    for block, patches in zip(blocks, tokens, strict=True):
        assert block.outlier_fraction == (patches.norm(dim=-1) > cutoff).float().mean()
        assert (block.cutoff.value, block.cutoff.source) == (cutoff, "given")


def test_one_token_that_is_not_finite_is_noticed(vit):
    seen = observe(vit, torch.randn(2, 3, 32, 32), norms=True)
    for token, value in ((0, torch.inf), (3, torch.nan), (20, torch.inf)):  # class token, register, patch
        norms = seen.norms.clone()
        norms[0, 1, token] = value
        meter = NormMeter()
        meter.update(dataclasses.replace(seen, norms=norms))
        assert not meter.is_finite


@pytest.mark.parametrize("registers", [0, 4])
def test_models_without_outliers_report_none_on_20_seeds(registers):
    vit = timm.create_model(f"vit_nano_reg{registers}")
    images = torch.randn(24, 3, 32, 32)
    for seed in range(20):
        torch.manual_seed(seed)
        if seed % 2:
            vit.init_weights()
        else:
            randomised(vit, seed=seed)
        blocks = patch_norms(vit, images, batch_size=24)
        assert [block.outlier_fraction for block in blocks] == [0, 0, 0, 0]
        assert {block.cutoff.source for block in blocks} == {"none"}


def contrasts(bright: torch.Tensor) -> torch.Tensor:
    """Noise whose contrast is six times higher in the patches of 4 x 4 pixels that are marked, [N, 8, 8]."""
    return torch.randn(len(bright), 3, 32, 32) * (
        1 + 5 * bright.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    )


@pytest.mark.parametrize(
    ("bright", "why"),
    [
        (torch.arange(24)[:, None, None] < torch.ones(1, 8, 8) * 3, "fills large parts of few images"),
        (torch.rand(24, 8, 8) < 0.1, "before the first block already"),
    ],
    ids=["bright images", "bright patches"],
)
def test_modes_that_come_from_the_images_are_no_outliers(bright, why):
    """A network that was not trained gives bright patches larger norms than dark ones."""
    vit = timm.create_model("vit_nano_reg4", num_classes=0)
    with torch.no_grad():
        vit.pos_embed.zero_()
    images = contrasts(bright)
    assert cutoff_of(observe(vit, images, norms=True).norms[-1, :, 5:].flatten().numpy()).source == "found"
    for block in patch_norms(vit, images):
        assert block.outlier_fraction == 0
        assert why in block.cutoff.why


def test_outliers_are_found_in_bright_and_dark_images_alike():
    truth = planted(norm=4000.0)
    with torch.no_grad():
        truth.model.patch_embed.proj.weight.mul_(torch.rand(32, 1, 1, 1) * 20)
    assert patch_norms(truth.model, truth.data)[1].outlier_fraction == truth.outliers.double().mean()


def test_memory_does_not_grow_with_images(vit):
    sizes = []
    for number in (8, 80):
        meter = NormMeter()
        for _ in range(number // 8):
            meter.update(observe(vit, torch.randn(8, 3, 32, 32), norms=True))
        sizes.append(len(pickle.dumps(meter)))
        assert meter.num_images == number
    assert sizes[1] <= sizes[0] + 64
