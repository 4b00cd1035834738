"""Likeness to neighbours against plain Python loops."""

import math
import pickle

import pytest
import torch

from vitreg_hub.analysis.meters.redundancy import NUM_BINS, NeighborSimilarity, neighbor_similarity
from vitreg_hub.tokens import Observation, TokenOrder

GRIDS = [(4, 5), (1, 6), (6, 1), (2, 2)]


def observed(embedded, grid):
    return Observation(
        images=torch.zeros(len(embedded), 3, 8, 8),
        order=TokenOrder(num_class=1, num_registers=0, grid=grid),
        norms=None,
        tokens={},
        normed=None,
        embedded=embedded,
        attention={},
    )


def measured(embedded, outliers, grid, batches):
    measure = NeighborSimilarity()
    for batch in batches:
        measure.update(observed(embedded[batch], grid), torch.tensor(batch), None, outliers[batch])
    return measure


def cosine(a, b):
    norms = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def by_hand(embedded, grid):
    """[image][patch] mean similarity, from lists."""
    rows, columns = grid
    result = []
    for image in embedded.tolist():
        values = []
        for r in range(rows):
            for c in range(columns):
                around = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
                near = [(i, j) for i, j in around if 0 <= i < rows and 0 <= j < columns]
                own = image[r * columns + c]
                values.append(sum(cosine(own, image[i * columns + j]) for i, j in near) / len(near))
        result.append(values)
    return result


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_what_a_loop_finds(grid):
    embedded = torch.randn(7, grid[0] * grid[1], 16) + torch.randn(7, 1, 16)
    embedded[2, 1] = 0  # a patch of nothing
    outliers = torch.rand(embedded.shape[:2]) < 0.3
    result = measured(embedded, outliers, grid, [[0, 1, 2], [3, 4, 5, 6]]).result()
    expected = by_hand(embedded, grid)
    for found, members in ((result.normal, ~outliers), (result.outlier, outliers)):
        values = [expected[i][p] for i, p in members.nonzero().tolist()]
        counts = [0] * NUM_BINS
        for value in values:
            counts[math.floor((value + 1) * NUM_BINS / 2)] += 1
        assert found.num_patches == len(values)
        assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert found.counts == tuple(counts)


def test_equal_and_opposite_neighbors_fill_the_end_bins():
    one = torch.randn(16)
    signs = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1])[:, None]  # a chequered 3 x 3 grid
    embedded = torch.stack([one.expand(9, 16), signs * one])
    outliers = torch.zeros(2, 9, dtype=torch.bool)
    outliers[1] = True
    result = measured(embedded, outliers, (3, 3), [[0, 1]]).result()
    assert result.normal.counts == (0,) * (NUM_BINS - 1) + (9,)
    assert result.normal.mean == pytest.approx(1)
    assert result.outlier.counts == (9,) + (0,) * (NUM_BINS - 1)
    assert result.outlier.mean == pytest.approx(-1)


def test_a_black_image_is_no_nan():
    assert torch.equal(neighbor_similarity(torch.zeros(1, 9, 4), (3, 3)), torch.zeros(1, 9))


def test_a_group_without_patches_is_none():
    embedded = torch.randn(2, 4, 8)
    assert measured(embedded, torch.zeros(2, 4, dtype=torch.bool), (2, 2), [[0, 1]]).result().outlier is None
    assert measured(embedded, torch.ones(2, 4, dtype=torch.bool), (2, 2), [[0, 1]]).result().normal is None


def test_a_single_patch_has_no_neighbors():
    result = measured(torch.randn(3, 1, 8), torch.zeros(3, 1, dtype=torch.bool), (1, 1), [[0, 1, 2]]).result()
    assert result.normal is None
    assert result.outlier is None


def test_batches_and_processes_do_not_matter():
    grid, embedded = (3, 4), torch.randn(10, 12, 8)
    outliers = torch.rand(10, 12) < 0.2
    whole = measured(embedded, outliers, grid, [list(range(10))])
    parts = [measured(embedded, outliers, grid, [[i] for i in range(start, 10, 2)]) for start in (0, 1)]
    for first, second in (parts, parts[::-1]):
        merged = pickle.loads(pickle.dumps(first))
        merged.merge(pickle.loads(pickle.dumps(second)))
        for group in ("normal", "outlier"):
            ours, theirs = getattr(merged.result(), group), getattr(whole.result(), group)
            assert ours.counts == theirs.counts
            assert ours.mean == pytest.approx(theirs.mean, rel=1e-12)


def test_half_precision_is_only_read():
    embedded = torch.randn(4, 9, 8).bfloat16()
    outliers = torch.rand(4, 9) < 0.3
    half, single = (measured(e, outliers, (3, 3), [[0, 1, 2, 3]]).result() for e in (embedded, embedded.float()))
    assert half == single
