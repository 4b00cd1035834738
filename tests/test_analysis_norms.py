"""Norms and outliers: what is planted is found exactly, what has one mode is left alone."""

import pickle

import numpy as np
import pytest
import timm
import torch
from models import randomised

from vitreg_hub.analysis.histogram import EDGES, bin_counts, count_above, edges, packed, quantiles
from vitreg_hub.analysis.measures import patch_norms
from vitreg_hub.analysis.norms import NormMeter
from vitreg_hub.analysis.outliers import find_cutoff
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


def cutoff_of(norms: np.ndarray):
    return find_cutoff(bin_counts(torch.tensor(norms)[None])[0])


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


def test_few_patches_show_no_modes():
    found = cutoff_of(np.array([1.0] * 400 + [100.0] * 20))
    assert found.value is None
    assert "420 patch tokens are too few" in found.why


def test_histogram_is_numpys():
    norms = torch.exp(torch.randn(3, 5000) * 2)
    counts = bin_counts(norms)
    for row, expected in zip(counts, norms.numpy(), strict=True):
        # numpy's bins are closed on the other side
        assert np.array_equal(row, np.histogram(-expected, -EDGES[::-1])[0][::-1])
    assert count_above(counts[0], EDGES[1000]) == (norms[0].numpy() > EDGES[1000]).sum()
    packed_counts = packed(counts[1])
    assert sum(packed_counts.counts) == 5000
    first, last = edges(packed_counts)[[0, -1]]
    assert first <= norms[1].min() <= norms[1].max() <= last
    assert packed_counts.counts[0] > 0 < packed_counts.counts[-1]


def test_a_norm_on_an_edge_is_not_above_it():
    counts = bin_counts(torch.from_numpy(EDGES[[500, 1000, 1000, 1500]])[None])[0]
    assert count_above(counts, float(EDGES[1000])) == 1


def test_norms_beyond_the_bins_are_counted():
    assert bin_counts(torch.tensor([[0.0, 1e-30, 1e30]]))[0][[0, -1]].tolist() == [2, 1]


def test_quantiles_are_numpys_to_a_bin():
    norms = np.exp(np.random.default_rng(0).normal(2, 0.7, 20_000)).astype(np.float32)
    ours = quantiles(bin_counts(torch.from_numpy(norms)[None])[0], QUANTILES)
    assert np.allclose(ours[1:-1], np.quantile(norms, QUANTILES[1:-1]), rtol=0.012)


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
    blocks = patch_norms(vit, images, cutoff=cutoff)
    for block, patches in zip(blocks, tokens, strict=True):
        assert block.outlier_fraction == (patches.norm(dim=-1) > cutoff).float().mean()
        assert (block.cutoff.value, block.cutoff.source) == (cutoff, "given")


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


def test_memory_does_not_grow_with_images(vit):
    sizes = []
    for number in (8, 80):
        meter = NormMeter()
        for _ in range(number // 8):
            meter.update(observe(vit, torch.randn(8, 3, 32, 32), norms=True))
        sizes.append(len(pickle.dumps(meter)))
        assert meter.num_images == number
    assert sizes[1] <= sizes[0] + 64
