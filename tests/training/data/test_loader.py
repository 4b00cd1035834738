"""Global batches: who gets what, whatever the number of processes and workers, and wherever a run goes on."""

import contextlib
import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pandas
import pytest
import torch
from timm.data import Mixup
from torchvision.transforms.functional import to_tensor
from training_files import data_set, png, served, training_data, write_folder, write_parquet, write_shards

from vitreg_hub.errors import DataError, RecipeError
from vitreg_hub.training.data.loader import TrainLoader
from vitreg_hub.training.data.opening import TrainingData
from vitreg_hub.training.recipes.settings import DataSettings


def noisy(image):
    """Two views: the picture, and what all three generators give."""
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    return to_tensor(image), torch.tensor(drawn)[:, None, None]


def rows(count, **columns):
    """Data with numbers 0, 1, ... in memory."""
    data = data_set(range(count))
    for name, column in columns.items():
        data = data.remove_columns([name] if name in data.column_names else []).add_column(name, column)
    return TrainingData(
        name="rows",
        rows=data.cast_column("image", datasets.Image(decode=False)),
        num_images=count,
        columns=tuple(data.column_names),
        image_column="image",
        label_column="label" if "label" in data.column_names else None,
        text_column="text" if "text" in columns else None,
        label_names=("a", "b", "c"),
        num_classes=3,
    )


def opened(train, **settings):
    return training_data(DataSettings(train=str(train), **settings))


def loader(data, batch_size=4, **options):
    return TrainLoader(data=data, transform=noisy, batch_size=batch_size, **options)


def numbers(batch):
    """The numbers that the pictures tell."""
    return (batch.crops[0][:, 0, 0, 0] * 255).round().int().tolist()


def same(one, other):
    assert (one.step, one.names, one.texts, one.corrupt) == (other.step, other.names, other.texts, other.corrupt)
    assert torch.equal(one.positions, other.positions)
    assert all(torch.equal(a, b) for a, b in zip(one.crops, other.crops, strict=True))
    assert (one.labels is None and other.labels is None) or torch.equal(one.labels, other.labels)


def all_same(some, others):
    for one, other in zip(some, others, strict=True):
        same(one, other)


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def by_position(batches):
    """View, noise, label and name by step and position."""
    found = {}
    for batch in batches:
        for i, position in enumerate(batch.positions.tolist()):
            key = batch.step, position
            assert key not in found
            label = int(batch.labels[i])
            found[key] = (batch.crops[0][i], batch.crops[1][i], label, batch.names[i])
    return found


# Rows with numbers


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_neither_processes_nor_parts_nor_workers_change_anything(world_size, accumulate, num_workers):
    data = rows(50)
    alone = by_position(loader(data, 12, seed=3).batches(0, 9))
    assert len(alone) == 9 * 12
    together = {}
    for rank in range(world_size):
        share = loader(
            data, 12, seed=3, rank=rank, world_size=world_size, accumulate=accumulate, num_workers=num_workers
        )
        batches = list(share.batches(0, 9))
        assert [batch.step for batch in batches] == [step for step in range(9) for _ in range(accumulate)]
        assert all(len(batch.names) == 12 // (world_size * accumulate) for batch in batches)
        part = by_position(batches)
        assert not part.keys() & together.keys()
        together |= part
    assert together.keys() == alone.keys()
    for key, (view, noise, label, name) in alone.items():
        assert torch.equal(view, together[key][0])
        assert torch.equal(noise, together[key][1])
        assert (label, name) == together[key][2:]


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch():
    data = rows(22)
    one = loader(data, 4)
    assert one.steps_per_epoch == 5
    epochs = [[n for batch in one.batches(5 * e, 5 * e + 5) for n in numbers(batch)] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) < set(range(22))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    other = [n for batch in loader(data, 4, seed=1).batches(0, 5) for n in numbers(batch)]
    assert other != epochs[0]


def test_labels_and_names_are_those_of_the_images(tmp_path):
    write_folder(tmp_path, 9)
    for batch in loader(opened(tmp_path), 3).batches(0, 3):
        assert batch.labels.tolist() == [n % 3 for n in numbers(batch)]
        assert batch.names == tuple(str(tmp_path / "abc"[n % 3] / f"{n:03}.png") for n in numbers(batch))
        assert (batch.texts, batch.corrupt) == (None, ())


def test_randomness_differs_between_images_and_steps_and_leaves_the_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    noise = torch.cat([batch.crops[1] for batch in loader(rows(8)).batches(0, 8)]).flatten(1)
    assert len(noise.unique(dim=0)) == 32
    assert len(noise.unique()) == 96
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 3), (3, 2)])
def test_mixup_of_parts_is_mixup_of_the_whole(world_size, accumulate):
    data, size = rows(40), 24

    def mixed(batch):
        torch.manual_seed(0)
        np.random.seed(0)
        images, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, num_classes=3)(batch.crops[0].clone(), batch.labels)
        return zip(batch.positions.tolist(), images, targets, strict=True)

    (whole,) = loader(data, size).batches(0, 1)
    wanted = {position: (image, target) for position, image, target in mixed(whole)}
    seen = 0
    for rank in range(world_size):
        for batch in loader(data, size, rank=rank, world_size=world_size, accumulate=accumulate).batches(0, 1):
            assert batch.positions.tolist() == sorted(batch.positions.tolist())
            for position, image, target in mixed(batch):
                assert torch.equal(image, wanted[position][0])
                assert torch.equal(target, wanted[position][1])
                seen += 1
    assert seen == size


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_images_stand_in_a_row_and_are_drawn_anew(repeats):
    data = rows(26)
    plain, repeated = loader(data, 6), loader(data, 6, repeats=repeats)
    assert repeated.steps_per_epoch == plain.steps_per_epoch == 4
    once = [n for batch in plain.batches(0, 4) for n in numbers(batch)]
    batches = list(repeated.batches(0, 4))
    found = [n for batch in batches for n in numbers(batch)]
    assert found == [n for n in once for _ in range(repeats)][:24]
    assert len(torch.cat([batch.crops[1] for batch in batches]).flatten(1).unique(dim=0)) == 24


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_at_any_step(num_workers):
    data = rows(22)
    whole = list(loader(data, repeats=2).batches(0, 12))
    for start in (0, 1, 4, 5, 11):
        later = loader(data, repeats=2, num_workers=num_workers)
        all_same(later.batches(start, 12), whole[start:])


def test_a_state_of_rows_fits_any_number_of_processes():
    data = rows(22)
    states = [loader(data, rank=rank, world_size=2).state() for rank in range(2)]
    loader(data, num_workers=1).load_state(json.loads(json.dumps(states)))


# Unreadable images


def broken(data, wrong):
    """Data in which some rows are no images."""
    images = [b"no image" if i in wrong else png(i) for i in range(data.num_images)]
    values = [{"bytes": image, "path": None} for image in images]
    table = data.rows.remove_columns("image").add_column("image", values, feature=datasets.Image(decode=False))
    return replace(data, rows=table)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_are_named_once_and_replaced(tmp_path, num_workers):
    write_folder(tmp_path, 30)
    for n, content in ((4, b""), (17, png(17)[:45]), (20, b"text")):
        (tmp_path / "abc"[n % 3] / f"{n:03}.png").write_bytes(content)
    files = {str(tmp_path / "abc"[n % 3] / f"{n:03}.png") for n in (4, 17, 20)}
    data = opened(tmp_path)
    one = loader(data, 10, max_corrupt=0.2, num_workers=num_workers)
    batches = list(one.batches(0, 9))
    assert Counter(name for batch in batches for name in batch.corrupt) == Counter(files)
    assert all(batch.labels.tolist() == [n % 3 for n in numbers(batch)] for batch in batches)
    assert all(len(batch.names) == 10 and not set(batch.names) & files for batch in batches)
    assert set(files) == {name for batch in batches[:3] for name in batch.corrupt}  # each is met in the first epoch
    # a run that goes on does not name them again, and draws the same in their place
    first = loader(data, 10, max_corrupt=0.2)
    list(first.batches(0, 2))
    second = loader(data, 10, max_corrupt=0.2)
    second.load_state([json.loads(json.dumps(first.state()))])
    all_same(second.batches(2, 9), batches[2:])
    assert second.state()["corrupt"] == one.state()["corrupt"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("count", "wrong", "allowed", "stops"),
    [
        (200, {3, 90, 150}, 0.01, True),  # 1.5 %
        (200, {3, 90}, 0.01, False),  # exactly 1 %
        (90, {7}, 0.01, True),  # 1.1 %
        (90, {7}, 0.02, False),
        (200, {3}, 0.0, True),
        (200, set(range(200)), 0.9, True),
        (200, set(range(0, 200, 2)), 0.6, False),
    ],
)
def test_a_run_stops_at_too_many_unreadable_images(count, wrong, allowed, stops, num_workers):
    one = loader(broken(rows(count), wrong), 10, max_corrupt=allowed, num_workers=num_workers)
    if not stops:
        found = {name for batch in one.batches(0, 2 * one.steps_per_epoch) for name in batch.corrupt}
        assert found == {f"row {n}" for n in wrong}
        return
    with pytest.raises(DataError) as caught:
        list(one.batches(0, one.steps_per_epoch))
    text = sentence(caught)
    known = int(text.split()[0])
    assert known <= len(wrong)
    assert known > allowed * count or len(wrong) == count  # then there is nothing to put in their place
    assert "images of rows cannot be read, " in text
    assert f"data.max_corrupt allows {allowed:.1%} (first: row " in text
    assert "replace or remove them" in text


def test_a_bad_start_is_no_reason_to_stop():
    """Two of the first ten images, in a set of which 0.5 % are unreadable."""
    data = rows(400)
    first = [int(name.split()[1]) for batch in loader(data, 10).batches(0, 1) for name in batch.names]
    batches = list(loader(broken(data, set(first[:2])), 10).batches(0, 40))
    assert len(batches[0].corrupt) == 2


# Labels and captions


def test_missing_and_wrong_labels():
    data = rows(12, label=[None, -1, *[1] * 10])
    found = torch.cat([batch.labels for batch in loader(data, 12).batches(0, 1)])
    assert sorted(found.tolist()) == [-1, -1, *[1] * 10]
    for num_workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(loader(data, 12, needs=["labels"], num_workers=num_workers).batches(0, 1))
        assert "of rows has no label, which this task needs" in sentence(caught)
        for wrong in (3, -2):
            with pytest.raises(DataError) as caught:
                list(loader(rows(12, label=[wrong] * 12), 12, num_workers=num_workers).batches(0, 1))
            assert f"has the label {wrong}, but classes are numbered from 0 to 2" in sentence(caught)
    with pytest.raises(DataError) as caught:
        loader(replace(data, label_column=None), needs=["labels"])
    assert sentence(caught).startswith("rows has no labels, which this task needs: name their column as data.label_col")


def test_captions():
    texts = [f"number {i}" for i in range(12)]
    for batch in loader(rows(12, text=texts), needs=["texts"]).batches(0, 3):
        assert batch.texts == tuple(f"number {n}" for n in numbers(batch))
    several = rows(12, text=[[f"{i} one", f"{i} two"] for i in range(12)])
    batches = list(loader(several).batches(0, 12))
    found = {(n, *text.split()) for batch in batches for n, text in zip(numbers(batch), batch.texts, strict=True)}
    assert all(str(n) == told for n, told, _ in found)
    assert len({which for _, _, which in found}) == 2
    all_same(loader(several, num_workers=2).batches(5, 12), batches[5:])
    for none in (None, ""):
        missing = rows(12, text=[none, *texts[1:]])
        assert "" in {text for batch in loader(missing).batches(0, 3) for text in batch.texts}
        with pytest.raises(DataError) as caught:
            list(loader(missing, needs=["texts"]).batches(0, 3))
        assert "row 0 of rows has no caption, which this task needs" in sentence(caught)
    with pytest.raises(
        DataError, match=r"rows has no texts, which this task needs: name their column as data\.text_col"
    ):
        loader(rows(12), needs=["texts"])


def test_numbers_that_contradict_each_other():
    with pytest.raises(RecipeError) as caught:
        loader(rows(40), 10, world_size=2, accumulate=2)
    assert "batch_size is 10, which 2 processes times scale.accumulate 2 do not divide" in sentence(caught)
    with pytest.raises(DataError) as caught:
        loader(rows(10), 12, world_size=2, accumulate=2)
    assert "rows has 10 images, which is less than one batch: give a batch_size of at most 8" in sentence(caught)


# Streams


def stream(root, **settings):
    return opened(root, shuffle_block=settings.pop("shuffle_block", 5), **settings)


@pytest.mark.parametrize(
    ("sizes", "world_size", "num_workers"),
    [
        *[(sizes, world_size, 0) for sizes in ([12], [6, 6], [7, 5, 9], [2] * 17) for world_size in (1, 2, 3)],
        ([12], 1, 2),
        ([7, 5, 9], 1, 2),
        ([3, 5, 4, 4], 2, 2),
        ([7, 5, 9], 2, 2),
    ],
)
def test_each_row_is_read_once_per_epoch(tmp_path, sizes, world_size, num_workers):
    write_shards(tmp_path, sizes)
    data, count = stream(tmp_path, stream_images=sum(sizes)), sum(sizes)
    readers = max(1, num_workers)
    found = {}
    for rank in range(world_size):
        one = loader(data, world_size, rank=rank, world_size=world_size, num_workers=num_workers)
        assert one.steps_per_epoch == count // world_size
        for batch in one.batches(0, 3 * count):
            position = one.state()["positions"][batch.step % readers]
            found.setdefault(position["epoch"], {}).setdefault((rank, batch.step % readers), []).extend(numbers(batch))
    complete = min(max(e for e, shares in found.items() if reader in shares) for reader in found[0])
    assert complete >= 2
    for epoch in range(complete):
        assert len(found[epoch]) == world_size * readers
        assert sorted(n for share in found[epoch].values() for n in share) == list(range(count))


def test_rows_are_shuffled_in_blocks_and_shards_by_epoch(tmp_path):
    write_shards(tmp_path, [10, 10, 10])
    one = loader(stream(tmp_path), 10)
    epochs = [[n for batch in one.batches(3 * e, 3 * e + 3) for n in numbers(batch)] for e in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(30))
        blocks = [epoch[i : i + 5] for i in range(0, 30, 5)]
        assert {tuple(sorted(block)) for block in blocks} == {tuple(range(i, i + 5)) for i in range(0, 30, 5)}
        assert sum(block == sorted(block) for block in blocks) <= 1
    orders = {tuple(n // 10 for n in epoch[::10]) for epoch in epochs}
    assert len(orders) > 1
    other = [n for batch in loader(stream(tmp_path), 10, seed=1).batches(0, 3) for n in numbers(batch)]
    assert other != epochs[0]


@contextlib.contextmanager
def streamed(kind, root):
    """22 images as a stream."""
    if kind in ("shards", "url"):
        write_shards(root, [4, 9, 3, 6])
    elif kind == "parquet":
        write_parquet(root, range(8), range(8, 11), range(11, 22))
    else:
        write_folder(root, 22)
    with served(root) if kind == "url" else contextlib.nullcontext() as url:
        yield stream(f"{url}/train-{{0000..0003}}.tar" if url else root, streaming=True)


def recorded(one, steps):
    """Batches, and the states before each and after the last, as they are written to a file."""
    batches, states = [], [json.dumps(one.state())]
    for batch in one.batches(0, steps):
        batches.append(batch)
        states.append(json.dumps(one.state()))
    return batches, states


@pytest.mark.parametrize("kind", ["shards", "url", "parquet", "folder"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_goes_on_wherever_it_was_cut(tmp_path, kind, world_size):
    """Steps of 3 images and blocks of 5: cuts lie in blocks, at their ends, and before, at and after ends of epochs."""
    options, steps = {"world_size": world_size, "rank": world_size - 1, "seed": 5}, 18
    with streamed(kind, tmp_path) as data:
        whole, states = recorded(loader(data, 3 * world_size, **options), steps)
        for cut in range(steps):
            later = loader(data, 3 * world_size, **options)
            later.load_state([json.loads(states[cut])] * world_size)
            all_same(islice(later.batches(cut, steps), 5), whole[cut : cut + 5])
        state = json.loads(states[0])  # cut after each step, again and again
        for cut in range(steps):
            later = loader(data, 3 * world_size, **options)
            later.load_state([state] * world_size)
            all_same(later.batches(cut, cut + 1), whole[cut : cut + 1])
            state = json.loads(json.dumps(later.state()))


@pytest.mark.parametrize(("kind", "world_size"), [("shards", 1), ("shards", 3), ("url", 1), ("parquet", 2)])
def test_a_stream_with_workers_goes_on_at_the_right_one(tmp_path, kind, world_size):
    options = {"num_workers": 2, "world_size": world_size, "rank": world_size - 1, "seed": 5}
    with streamed(kind, tmp_path) as data:
        whole, states = recorded(loader(data, 3 * world_size, **options), 12)
        for cut in (3, 4):
            later = loader(data, 3 * world_size, **options)
            later.load_state([json.loads(states[cut])] * world_size)
            all_same(later.batches(cut, 12), whole[cut:])


def test_a_stream_of_one_worker_is_that_of_none(tmp_path):
    write_shards(tmp_path, [7, 6])
    with_one = loader(stream(tmp_path), num_workers=1).batches(0, 8)
    all_same(with_one, list(loader(stream(tmp_path)).batches(0, 8)))


def test_an_iteration_that_was_left_goes_on(tmp_path):
    write_shards(tmp_path, [7, 6])
    whole = list(loader(stream(tmp_path), num_workers=2, accumulate=2).batches(0, 8))
    one = loader(stream(tmp_path), num_workers=2, accumulate=2)
    first = list(islice(one.batches(0, 8), 6))
    all_same(first + list(one.batches(3, 8)), whole)
    with pytest.raises(DataError) as caught:
        next(iter(one.batches(3, 8)))
    assert "is a stream at step 8 and cannot begin at step 3: go on from a checkpoint" in sentence(caught)


def test_rows_of_a_stream_are_repeated_and_drawn_anew(tmp_path):
    write_shards(tmp_path, [12])
    plain = [n for batch in loader(stream(tmp_path), 6).batches(0, 2) for n in numbers(batch)]
    one = loader(stream(tmp_path), 6, repeats=3)
    batches, states = recorded(one, 8)
    found = [n for batch in batches for n in numbers(batch)]
    assert found[:36] == [n for n in plain for _ in range(3)]
    assert len(torch.cat([batch.crops[1] for batch in batches]).flatten(1).unique(dim=0)) == 48
    for cut in range(7):
        later = loader(stream(tmp_path), 6, repeats=3)
        later.load_state([json.loads(states[cut])])
        all_same(later.batches(cut, 8), batches[cut:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_of_a_stream_are_named_and_skipped(tmp_path, num_workers):
    write_shards(tmp_path, [12, 12])
    content = (tmp_path / "train-0001.tar").read_bytes()
    assert content.count(png(15)) == content.count(png(20)) == 1
    for n in (15, 20):
        content = content.replace(png(n), b"x" * len(png(n)))
    (tmp_path / "train-0001.tar").write_bytes(content)
    data, options = stream(tmp_path), {"num_workers": num_workers, "max_corrupt": 0.2}
    batches, states = recorded(loader(data, 2, **options), 24)
    named = Counter(name for batch in batches for name in batch.corrupt)
    assert named == Counter({f"000{n}.png in train-0001.tar": 1 for n in (15, 20)})
    assert set(range(24)) - {15, 20} == {n for batch in batches for n in numbers(batch)}
    for cut in (4, 9, 13, 20):
        later = loader(data, 2, **options)
        later.load_state([json.loads(states[cut])])
        all_same(later.batches(cut, 24), batches[cut:])
        assert later.state() == json.loads(states[-1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_stops_at_too_many_unreadable_images(tmp_path, num_workers):
    write_shards(tmp_path, [40])
    content = (tmp_path / "train-0000.tar").read_bytes()
    for n in range(40):
        content = content.replace(png(n), b"x" * len(png(n)))
    (tmp_path / "train-0000.tar").write_bytes(content)
    for known in (None, 40):
        one = loader(stream(tmp_path, stream_images=known), 4, max_corrupt=0.5, num_workers=num_workers)
        with pytest.raises(DataError) as caught:
            list(one.batches(0, 10))
        assert "cannot be read, 100.0% of those that were tried, where data.max_corrupt allows 50.0% (first: 000" in (
            sentence(caught)
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_that_break_off_are_named(tmp_path, num_workers):
    write_shards(tmp_path, [12, 12])
    whole = (tmp_path / "train-0001.tar").read_bytes()
    (tmp_path / "train-0001.tar").write_bytes(whole[: 1024 * 20 + 520])  # in the content of a file
    with pytest.raises(DataError) as caught:
        list(loader(stream(tmp_path), num_workers=num_workers).batches(0, 12))
    assert f"{tmp_path} cannot be read any further: unexpected end of data" in sentence(caught)


def test_what_a_stream_cannot_do(tmp_path):
    write_shards(tmp_path, [2])
    with pytest.raises(DataError) as caught:
        loader(stream(tmp_path)).steps_per_epoch  # noqa: B018
    assert "does not say how many images it has: give data.stream_images" in sentence(caught)
    with pytest.raises(DataError) as caught:
        list(loader(stream(tmp_path), 4, num_workers=4).batches(0, 8))
    assert "has nothing for reader 3 of 4" in sentence(caught)
    state = loader(stream(tmp_path)).state()
    for data, states, options in (
        (stream(tmp_path), [state, state], {}),
        (stream(tmp_path), [state], {"num_workers": 2}),
        (rows(9), [state], {}),
        (stream(tmp_path), [loader(rows(9)).state()], {}),
    ):
        with pytest.raises(DataError) as caught:
            loader(data, **options).load_state(states)
        assert "the checkpoint comes from" in sentence(caught)
        assert "a stream goes on with the same numbers only" in sentence(caught)


def test_missing_labels_of_a_stream(tmp_path):
    frame = pandas.DataFrame({"image": [png(i) for i in range(4)], "label": pandas.array([0, None, 1, 1], "Int64")})
    frame.to_parquet(tmp_path / "x.parquet")
    data = stream(tmp_path, streaming=True)
    (batch,) = loader(data).batches(0, 1)
    assert sorted(batch.labels.tolist()) == [-1, 0, 1, 1]
    for num_workers in (0, 1):
        with pytest.raises(DataError) as caught:
            list(loader(data, needs=["labels"], num_workers=num_workers).batches(0, 1))
        assert "row 1 of" in sentence(caught)
        assert "has no label, which this task needs" in sentence(caught)
