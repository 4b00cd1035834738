"""Samples that are uniform, bounded, and the same whatever the batches and processes."""

import pickle

import pytest
import torch

from vitreg_hub.analysis.meters.sampling import NEVER, Sample, hashed, is_test


def test_hash_is_splitmix64():
    # first outputs of the reference implementation for seeds 0 and 1234567
    assert hashed(0).tolist() == [0xE220A8397B1DCDAF >> 1]
    assert hashed(1234567).tolist() == [6457827717110365317 >> 1]


def test_hashes_broadcast_and_depend_on_every_part():
    indices, positions = torch.arange(50), torch.arange(40)
    table = hashed(3, indices[:, None], positions)
    assert table.shape == (50, 40)
    assert hashed(3, torch.tensor([7]), torch.tensor([11])).item() == table[7, 11]
    assert not torch.equal(hashed(3, positions[:, None], indices), table.T)
    both_seeds = torch.cat([table, hashed(4, indices[:, None], positions)])
    assert both_seeds.unique().numel() == 2 * 50 * 40
    assert both_seeds.min() >= 0
    assert both_seeds.max() < NEVER


def test_hashes_of_neighbors_are_uniform_and_independent():
    """Chi-squared of 16 x 16 cells; 5 standard deviations (sqrt(2 * 255)) above its mean of 255."""
    table = hashed(0, torch.arange(300)[:, None], torch.arange(301)) >> 59  # the 4 highest bits
    for a, b in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1])):
        counts = torch.bincount((a * 16 + b).flatten(), minlength=256).double()
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 510**0.5


def test_every_item_is_equally_likely():
    items, size, trials = 20, 5, 4000
    times = torch.zeros(items)
    for seed in range(trials):
        sample = Sample(size)
        for portion in torch.arange(items).split(7):
            sample.add(hashed(seed, portion), portion)
        times[sample.result()[1]] += 1
    share = size / items
    assert times.sum() == size * trials
    assert (times - trials * share).abs().max() < 5 * (trials * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("portion", [1, 3, 64, 1000])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_it_holds_the_smallest_in_order(portion, num_processes):
    size, priorities = 17, torch.randperm(1000)
    features = torch.randn(1000, 2, 3)
    samples = [Sample(size) for _ in range(num_processes)]
    for i, rows in enumerate(torch.randperm(1000).split(portion)):
        samples[i % num_processes].add(priorities[rows], features[rows], rows)
    merged = Sample(size)
    for sample in samples[::-1]:
        merged.merge(pickle.loads(pickle.dumps(sample)))
    found, columns, rows = merged.result()
    assert len(merged) == size
    assert found.tolist() == list(range(size))
    assert torch.equal(priorities[rows], found)
    assert torch.equal(columns, features[rows])


def test_the_last_that_fits_is_kept_in_whatever_order_items_come():
    for _ in range(200):
        sample = Sample(3)
        for priority in torch.randperm(30):
            sample.add(priority[None])
        assert sample.result()[0].tolist() == [0, 1, 2]


def test_items_may_have_any_shape_and_columns_any_strides():
    priorities = torch.randperm(24).reshape(2, 3, 4)
    column = torch.randn(5, 4, 3, 2).permute(3, 2, 1, 0)
    sample = Sample(10)
    sample.add(priorities, column)
    found, columns = sample.result()
    for priority, kept in zip(found, columns, strict=True):
        b, r, c = (priorities == priority).nonzero()[0]
        assert torch.equal(kept, column[b, r, c])


def test_what_never_exists_is_not_sampled():
    sample = Sample(4)
    sample.add(torch.tensor([NEVER, 5, NEVER, 3]), torch.arange(4))
    assert sample.result()[1].tolist() == [3, 1]
    sample.add(torch.full((3,), NEVER), torch.arange(3))
    assert len(sample) == 2


def test_an_empty_sample_is_empty_and_merges():
    sample, other = Sample(4), Sample(4)
    assert sample.result() == ()
    sample.merge(pickle.loads(pickle.dumps(other)))
    assert len(sample) == 0
    other.add(torch.tensor([1]), torch.tensor([2.0]))
    sample.merge(other)
    assert len(sample) == 1


def test_memory_is_bounded():
    """Neither many items nor large batches leave more behind than twice the sample."""

    def num_bytes(portions, portion):
        sample = Sample(50)
        for start in range(0, portions * portion, portion):
            rows = torch.arange(start, start + portion)
            sample.add(hashed(0, rows), torch.zeros(portion, 100))
        return len(pickle.dumps(vars(sample))), len(pickle.dumps(sample))

    row = 100 * 4 + 8
    for portions, portion in ((10, 10), (4000, 10), (10, 4000), (1000, 1)):
        held, sent = num_bytes(portions, portion)
        assert 50 * row <= sent < 50 * row + 2000
        assert held < 2 * 50 * row + 2000 * 50


def test_numbers_are_kept_as_float32_and_integers_as_they_are():
    sample = Sample(2)
    sample.add(torch.tensor([1, 2]), torch.tensor([1.5, 2.5]).bfloat16(), torch.tensor([2**40, 1]))
    _, numbers, integers = sample.result()
    assert numbers.dtype == torch.float32
    assert integers.tolist() == [2**40, 1]


def test_one_image_in_five_is_for_testing_and_no_class_is_missed_that_comes_in_turn():
    testing = is_test(torch.arange(1000))
    assert (testing.reshape(-1, 5).sum(1) == 1).all()
    assert torch.equal(is_test(torch.arange(200, 300)), testing[200:300])
    for period in (2, 5, 10):
        assert (torch.bincount(torch.arange(1000)[testing] % period) > 10).all()
