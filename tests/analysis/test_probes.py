"""Probes on synthetic tokens: what is planted is found, what is absent is chance, whatever the batches."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitreg_hub.analysis.meters.global_probe import INVERSE_PENALTIES, TokenClassification
from vitreg_hub.analysis.meters.local_probes import PIXEL_ALPHAS, LocalProbes, constant_cells, patch_pixels
from vitreg_hub.analysis.meters.sampling import hashed, is_test
from vitreg_hub.tokens import Observation, TokenOrder

pytestmark = pytest.mark.filterwarnings("error")  # a regression that does not converge warns

GRID, PATCH, WIDTH = (3, 4), 2, 24
PLACES = GRID[0] * GRID[1]
SEEDS = range(5)


@dataclasses.dataclass
class Data:
    """All images of a data set and what a model makes of them, with noise where a test plants nothing."""

    num: int
    num_class_tokens: int = 1
    num_registers: int = 2

    def __post_init__(self):
        self.images = torch.randn(self.num, 3, GRID[0] * PATCH, GRID[1] * PATCH)
        self.patches = torch.randn(self.num, PLACES, WIDTH)
        self.cls = torch.randn(self.num, self.num_class_tokens, WIDTH)
        self.registers = torch.randn(self.num, self.num_registers, WIDTH)
        self.labels = torch.randint(3, (self.num,))
        self.outliers = torch.zeros(self.num, PLACES, dtype=torch.bool)

    def plant_outliers(self, images=slice(None), per_image=3):
        self.outliers[images] = torch.rand(self.num, PLACES).argsort(dim=1)[images] < per_image

    def show(self, measure, batches, labelled=True, dtype=torch.float32):
        order = TokenOrder(num_class=self.num_class_tokens, num_registers=self.num_registers, grid=GRID)
        for batch in batches:
            tokens = torch.cat([self.cls[batch], self.registers[batch], self.patches[batch]], dim=1).to(dtype)
            seen = Observation(
                images=self.images[batch].to(dtype),
                order=order,
                norms=None,
                tokens={},
                normed=order.split(tokens),
                embedded=None,
                attention={},
            )
            measure.update(seen, batch, self.labels[batch] if labelled else None, self.outliers[batch])
        return measure

    def result(self, measure, **how):
        return self.show(measure, torch.arange(self.num).split(64), **how).result()


def accuracies(information):
    return {token.token: token.accuracy for token in information.tokens}


def chance_bound(chance, num):
    """5 standard deviations of a share of `num` independent guesses."""
    return 5 * (chance * (1 - chance) / num) ** 0.5


# Local information


def test_planted_position_is_found_in_the_group_that_has_it():
    data = Data(200)
    data.plant_outliers()
    data.patches[~data.outliers] += 20 * torch.eye(PLACES, WIDTH).repeat(200, 1, 1)[~data.outliers]
    found = data.result(LocalProbes())
    assert (found.normal.position_accuracy, found.normal.position_distance) == (1, 0)
    assert abs(found.outlier.position_accuracy - 1 / PLACES) < chance_bound(1 / PLACES, found.outlier.num_test)
    assert found.outlier.position_distance > 1
    assert found.normal.num_train == found.outlier.num_train == 160 * 3
    assert (found.normal.num_test, found.outlier.num_test) == (40 * 9, 40 * 3)
    assert found.why_not is None


def test_planted_pixels_are_found_in_the_group_that_has_them():
    data = Data(200)
    data.plant_outliers()
    pixels = (
        data.images.reshape(200, 3, GRID[0], PATCH, GRID[1], PATCH).permute(0, 2, 4, 3, 5, 1).reshape(200, PLACES, -1)
    )
    data.patches[data.outliers] = (pixels @ torch.randn(pixels.shape[-1], WIDTH) + 3)[data.outliers]
    found = data.result(LocalProbes())
    assert found.outlier.pixel_error < 1e-3 * found.outlier.chance_error
    assert found.normal.pixel_error > 0.95 * found.normal.chance_error


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_of_noise_tell_nothing(seed):
    torch.manual_seed(seed)
    found = Data(150).result(LocalProbes()).normal
    assert abs(found.position_accuracy - 1 / PLACES) < chance_bound(1 / PLACES, found.num_test)
    assert found.chance_accuracy == pytest.approx(1 / PLACES)
    # 24 channels fitted to 1,440 tokens can add at most about 24 / 1,440 to the squared error
    assert found.pixel_error == pytest.approx(found.chance_error, rel=24 / 1440)
    # guesses that are spread over the grid are farther off than its middle is
    assert found.position_distance > found.chance_distance


@pytest.mark.parametrize("num", [60, 13])
def test_probes_are_scikit_learns_and_closed_forms(num):
    """All tokens fit into the samples; ridge regressions by their normal equations."""
    data = Data(num)
    data.patches += 0.3 * patch_pixels(data.images, GRID).flatten(3).flatten(1, 2) @ torch.randn(12, WIDTH)
    data.patches += 2.5 * torch.eye(PLACES, WIDTH)
    found = data.result(LocalProbes(seed=3)).normal

    pixels = np.stack(
        [
            data.images[i, :, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].flatten().numpy()
            for i in range(num)
            for r in range(GRID[0])
            for c in range(GRID[1])
        ]
    )
    order = hashed(3, torch.arange(num)[:, None], torch.arange(PLACES)).flatten().argsort().numpy()
    testing = is_test(torch.from_numpy(order // PLACES)).numpy()
    train, test = order[~testing], order[testing]
    tokens = data.patches.flatten(0, 1).numpy()
    scaler = StandardScaler().fit(tokens[train])
    x, x_test = scaler.transform(tokens[train]), scaler.transform(tokens[test])
    places = LogisticRegression(max_iter=1000).fit(x, train % PLACES).predict(x_test)
    rows, columns = np.divmod(places, GRID[1])
    true_rows, true_columns = np.divmod(test % PLACES, GRID[1])
    assert 0.2 < found.position_accuracy < 0.9
    assert found.position_accuracy == (places == test % PLACES).mean()
    assert found.position_distance == pytest.approx(np.hypot(rows - true_rows, columns - true_columns).mean())
    assert found.chance_accuracy == pytest.approx(1 / PLACES)
    middle = [np.hypot(true_rows - r, true_columns - c).mean() for r in (1,) for c in (1, 2)]
    assert found.chance_distance == pytest.approx(middle[0])
    assert middle[0] == pytest.approx(middle[1])

    def ridge(x, y, alpha, x_test):
        center, mean = x.mean(axis=0), y.mean(axis=0)
        weights = np.linalg.solve((x - center).T @ (x - center) + alpha * np.eye(WIDTH), (x - center).T @ (y - mean))
        return (x_test - center) @ weights + mean

    x, x_test, y, y_test = (a.astype(np.float64) for a in (x, x_test, pixels[train], pixels[test]))
    held_out = len(x) // 10
    errors = [((ridge(x[held_out:], y[held_out:], a, x[:held_out]) - y[:held_out]) ** 2).mean() for a in PIXEL_ALPHAS]
    best = PIXEL_ALPHAS[int(np.argmin(errors))]
    error = np.linalg.norm(ridge(x, y, best, x_test) - y_test, axis=1).mean()
    assert best > PIXEL_ALPHAS[0]
    assert found.pixel_error == pytest.approx(error, rel=1e-9)
    assert found.chance_error == pytest.approx(np.linalg.norm(y.mean(axis=0) - y_test, axis=1).mean(), rel=1e-9)


def test_pixels_are_cut_from_where_the_patch_is():
    images = torch.randn(2, 3, 13, 11)  # 3 x 2 patches of 4 x 5 pixels, and what is left over
    patches = patch_pixels(images, (3, 2))
    assert patches.shape == (2, 3, 2, 3, 4, 5)
    for r in range(3):
        for c in range(2):
            assert torch.equal(patches[:, r, c], images[:, :, 4 * r : 4 * r + 4, 5 * c : 5 * c + 5])


def test_best_constant_cells_are_what_trying_all_finds():
    cells = np.array([(0, 0)] * 3 + [(0, 4)] * 2 + [(4, 0)] * 2 + [(4, 4)] * 2)
    likeliest, nearest = constant_cells(cells)
    everywhere = [(r, c) for r in range(-2, 8) for c in range(-2, 8)]
    distances = [sum(np.hypot(r - i, c - j) for i, j in cells) for r, c in everywhere]
    assert likeliest.tolist() == [0, 0]
    assert tuple(nearest) == everywhere[int(np.argmin(distances))]
    assert tuple(nearest) not in map(tuple, cells)


def test_outliers_that_are_always_in_one_place():
    data = Data(150)
    data.outliers[:, 5] = True
    found = data.result(LocalProbes()).outlier
    assert (found.position_accuracy, found.chance_accuracy) == (1, 1)
    assert (found.position_distance, found.chance_distance) == (0, 0)


def test_places_that_training_never_saw_are_missed():
    data = Data(150)
    data.outliers[:, 0] = True
    testing = is_test(torch.arange(len(data.outliers)))
    data.outliers[testing, 0], data.outliers[testing, 11] = False, True  # test images have them in the other corner
    found = data.result(LocalProbes()).outlier
    assert (found.position_accuracy, found.chance_accuracy) == (0, 0)
    assert found.position_distance == found.chance_distance == pytest.approx((2**2 + 3**2) ** 0.5)


def test_too_few_outliers_say_so_and_leave_the_others_all_tokens():
    data = Data(50)
    without = data.result(LocalProbes())
    assert without.outlier is None
    assert without.why_not == "There are no outlier patches."
    data.outliers[:10, 0] = True
    few = data.result(LocalProbes())
    assert few.outlier is None
    assert "8 to fit probes to and 2 to score them on" in few.why_not
    assert few.normal.num_train == 40 * PLACES - 8
    none = Data(2).result(LocalProbes())
    assert none.normal is None
    assert "24 to fit probes to and 0" in none.why_not


def test_dependent_and_constant_channels_are_fitted_without_warnings():
    data = Data(100)
    data.patches = torch.nn.functional.layer_norm(data.patches, (WIDTH,))
    data.patches[..., 3] = 0
    data.patches[..., 4] = data.patches[..., 5] * 1e4
    found = data.result(LocalProbes())
    assert found.normal.pixel_error == pytest.approx(found.normal.chance_error, rel=0.05)


@pytest.mark.parametrize("measure", [LocalProbes, TokenClassification])
def test_half_precision_is_only_read(measure):
    data = Data(300)
    data.plant_outliers()
    half = data.result(measure(), dtype=torch.bfloat16)
    for name in ("images", "patches", "cls", "registers"):
        setattr(data, name, getattr(data, name).bfloat16().float())
    assert data.result(measure()) == half


# Global information


def test_planted_classes_are_found_in_the_tokens_that_have_them():
    data = Data(600, num_class_tokens=2)
    data.plant_outliers()
    classes = 20 * torch.eye(3, WIDTH)[data.labels]
    data.patches[data.outliers] += classes.repeat_interleave(3, dim=0)
    data.registers[:, 1] += classes
    found = data.result(TokenClassification())
    told = accuracies(found)
    assert list(told) == ["class", "class 2", "normal patch", "outlier patch", "register 1", "register 2"]
    assert told["outlier patch"] == told["register 2"] == 1
    for token in ("class", "class 2", "normal patch", "register 1"):
        assert abs(told[token] - 1 / 3) < chance_bound(1 / 3, 120)
    assert (found.num_classes, found.num_train, found.num_test, found.why_not) == (3, 480, 120, None)
    testing = is_test(torch.arange(600))
    most_frequent = data.labels[~testing].mode().values
    assert found.chance == pytest.approx((data.labels[testing] == most_frequent).float().mean().item())


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_in_normal_patches_are_not_found_in_outliers(seed):
    torch.manual_seed(seed)
    data = Data(600)
    data.plant_outliers(per_image=PLACES - 1)
    data.patches[~data.outliers] += 20 * torch.eye(3, WIDTH)[data.labels]
    told = accuracies(data.result(TokenClassification(seed=seed)))
    assert told.pop("normal patch") == 1
    for accuracy in told.values():
        assert abs(accuracy - 1 / 3) < chance_bound(1 / 3, 120)


@pytest.mark.parametrize("num", [400, 100])
def test_regression_is_the_one_that_does_best_on_a_tenth(num):
    data = Data(num, num_registers=0)
    data.cls[:, 0] += 1.2 * torch.eye(3, WIDTH)[data.labels]
    data.cls *= torch.logspace(-2, 2, WIDTH)
    found = accuracies(data.result(TokenClassification(seed=5)))["class"]

    order = hashed(5, torch.arange(num)).argsort()
    train, test = order[~is_test(order)], order[is_test(order)]
    tokens, labels = data.cls[:, 0].numpy(), data.labels.numpy()
    fitted, held_out = train[torch.arange(len(train)) % 10 != 0], train[::10]

    def score(c, train, test):
        scaler = StandardScaler().fit(tokens[train])
        regression = LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(tokens[train]), labels[train])
        return (regression.predict(scaler.transform(tokens[test])) == labels[test]).mean()

    scores = [score(c, fitted, held_out) for c in INVERSE_PENALTIES]
    assert len(set(scores)) > 1
    assert found == score(INVERSE_PENALTIES[int(np.argmax(scores))], train, test)
    assert 0.35 < found < 0.95


def test_only_images_with_both_kinds_are_used():
    data = Data(1000)
    data.plant_outliers(images=slice(0, 400))
    data.outliers[:20] = True  # no normal patch
    found = data.result(TokenClassification())
    assert (found.num_train, found.num_test) == (304, 76)
    assert "outlier patch" in accuracies(found)
    smaller = data.result(TokenClassification(train_size=200, test_size=100))
    assert (smaller.num_train, smaller.num_test) == (200, 76)


@pytest.mark.parametrize(("num_with", "reason"), [(0, "No image has both"), (30, "24 to fit and 6 to score")])
def test_too_few_outliers_leave_the_other_tokens_all_images(num_with, reason):
    data = Data(200)
    data.plant_outliers(images=slice(0, num_with))
    found = data.result(TokenClassification())
    assert list(accuracies(found)) == ["class", "normal patch", "register 1", "register 2"]
    assert (found.num_train, found.num_test) == (160, 40)
    assert reason in found.why_not


def test_tokens_that_a_model_lacks_are_left_out():
    found = Data(200, num_class_tokens=0, num_registers=0).result(TokenClassification())
    assert list(accuracies(found)) == ["normal patch"]


def test_without_classes_there_is_nothing_to_find():
    data = Data(200)
    unlabelled = data.result(TokenClassification(), labelled=False)
    data.labels[:] = -1  # missing
    missing = data.result(TokenClassification())
    data.labels[:] = 2
    alike = data.result(TokenClassification())
    few = Data(60).result(TokenClassification())
    missed = (missing, "0 to fit regressions to and 0")
    for found, reason in (
        missed,
        (unlabelled, "no labels"),
        (alike, "one class"),
        (few, "48 to fit regressions to and 12"),
    ):
        assert (found.tokens, found.chance, found.num_train, found.num_test) == ((), None, 0, 0)
        assert reason in found.why_not


def test_a_class_that_training_never_saw_is_missed():
    data = Data(500)
    data.labels[is_test(torch.arange(500)).nonzero()[::2]] = 7  # half of the test images
    data.cls[:, 0] += 20 * torch.eye(8, WIDTH)[data.labels]
    found = data.result(TokenClassification())
    assert found.num_classes == 4
    assert accuracies(found)["class"] == 0.5


# Batches, processes, memory


@pytest.mark.parametrize("measure", [LocalProbes, TokenClassification])
def test_batches_and_processes_do_not_matter(measure):
    """Also with samples that are much smaller than the data."""

    def new():
        return measure(train_size=90, test_size=40, seed=1)

    data = Data(350)
    data.plant_outliers(images=slice(0, 330))
    everything = torch.arange(350)
    whole = data.show(new(), [everything]).result()
    assert whole.why_not is None
    for batches in (everything.split(1), everything.split(3), torch.randperm(350).split(50)):
        assert data.show(new(), batches).result() == whole
    parts = [data.show(new(), everything[start::2].split(16)) for start in (0, 1)]
    parts.append(new())  # a process that saw nothing
    for order in ((0, 1, 2), (2, 1, 0)):
        first, *others = (pickle.loads(pickle.dumps(parts[i])) for i in order)
        for other in others:
            first.merge(other)
        assert first.result() == whole


@pytest.mark.parametrize("measure", [LocalProbes, TokenClassification])
def test_memory_does_not_grow_with_the_number_of_images(measure):
    data = Data(1600)
    data.plant_outliers()
    sizes = []
    seen = measure(train_size=20, test_size=10)
    for images in torch.arange(1600).split(400):
        data.show(seen, images.split(20))
        sizes.append(len(pickle.dumps(seen)))
    assert max(sizes) - min(sizes) < 100
