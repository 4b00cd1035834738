"""Training data of every kind, against the files that were written."""

import contextlib
from dataclasses import replace

import datasets
import pandas
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor
from training_files import held_out_source, png, served, training_data, write_folder, write_parquet, write_shards

from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import TRAINING_SETS
from vitreg_hub.images.pictures import read_rgb
from vitreg_hub.training.data.classes import open_data
from vitreg_hub.training.data.opening import as_image_source
from vitreg_hub.training.recipes.settings import DataSettings


def opened(train, **settings):
    return training_data(DataSettings(train=str(train), **settings))


def numbers(data):
    """The numbers that the pictures tell."""
    return [read_rgb(row[data.image_column]).getpixel((0, 0))[0] for row in data.rows]


def labels(data):
    return [row[data.label_column] for row in data.rows]


def refusal(train, **settings):
    with pytest.raises(DataError) as caught:
        opened(train, **settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def held_out_of(settings):
    return held_out_source(settings, training_data(settings))


@pytest.mark.parametrize(
    ("name", "streaming"), [("digits", False), ("digits", True), ("photos", False), ("scenes", False)]
)
def test_embedded_sets(name, streaming):
    settings = DataSettings(train=name, streaming=streaming)
    data, own, own_test = training_data(settings), TRAINING_SETS[name]("train"), TRAINING_SETS[name]("test")
    assert (data.name, data.num_images, data.is_stream) == (name, len(own), streaming)
    assert data.label_names == tuple(own.features["label"].names)
    assert (data.has_labels, data.has_texts, data.num_classes) == (True, name == "scenes", len(data.label_names))
    assert labels(data) == own["label"][:]
    first = next(iter(data.rows))
    assert read_rgb(first["image"]).tobytes() == own[0]["image"].tobytes()
    held_out = held_out_source(settings, data).at_most(5, seed=0)
    assert held_out.label_names == data.label_names
    (batch,) = held_out.batches(to_tensor, batch_size=5)
    for index, image, label in zip(batch.indices, batch.images, batch.labels, strict=True):
        assert torch.equal(image, to_tensor(own_test[int(index)]["image"]))
        assert label == own_test[int(index)]["label"]


def test_folder_is_read_as_torchvision_does(tmp_path):
    write_folder(tmp_path, 8)
    data, own = opened(tmp_path), ImageFolder(tmp_path)
    assert (data.num_images, data.is_stream, data.label_names) == (8, False, tuple(own.classes))
    assert labels(data) == own.targets
    assert [data.called(row, i) for i, row in enumerate(data.rows)] == [path for path, _ in own.samples]
    assert sorted(numbers(opened(tmp_path, streaming=True))) == list(range(8))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["folder", "glob", "one", "braces"])
def test_parquet(tmp_path, form, streaming):
    write_parquet(tmp_path, range(5), range(5, 12))
    name = {"folder": "", "glob": "*.parquet", "one": "part-1.parquet", "braces": "part-{0..1}.parquet"}[form]
    data = opened(tmp_path / name, streaming=streaming)
    wanted = list(range(5 if form == "one" else 0, 12))
    assert (numbers(data), labels(data)) == (wanted, [i % 3 for i in wanted])
    assert (data.is_stream, data.label_names, data.num_classes) == (streaming, ("a", "b", "c"), 3)
    assert data.num_images == (None if streaming else len(wanted))
    assert data.called(data.rows[4] if not streaming else next(iter(data.rows)), 4) == "row 4"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stored", ["bytes", "struct"])
def test_parquet_that_pandas_wrote(tmp_path, stored, streaming):
    images = [png(i) if stored == "bytes" else {"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    pandas.DataFrame({"picture": images, "cls": [0, 4, 1, 2]}).to_parquet(tmp_path / "x.parquet")
    data = opened(tmp_path / "x.parquet", streaming=streaming)
    assert (numbers(data), labels(data)) == ([0, 1, 2, 3], [0, 4, 1, 2])
    assert (data.label_names, data.num_classes) == (None, None if streaming else 5)


SHARDS = {
    "train-0001.tar": [4, 5, 6],
    "": list(range(12)),
    "train-*.tar": list(range(12)),
    "train-{0000..0002}.tar": list(range(12)),
    "train-{0002,0000}.tar": [*range(7, 12), *range(4)],
    "train-00{00,0{1..2}}.tar": list(range(12)),
}
"""Numbers in the pictures of shards, by what is asked for."""


@pytest.mark.parametrize("form", SHARDS)
@pytest.mark.parametrize("by_url", [False, True])
def test_shards_are_streamed(tmp_path, form, by_url):
    if by_url and (not form or "*" in form):
        pytest.skip("URLs cannot be listed")
    wanted = SHARDS[form]
    write_shards(tmp_path, [4, 3, 5])
    with served(tmp_path) if by_url else contextlib.nullcontext(tmp_path) as root:
        data = opened(f"{root}/{form}", shuffle_block=7)
        assert (data.num_images, data.label_names, data.num_classes, data.shuffle_block) == (None, None, None, 7)
        assert (data.is_stream, data.has_labels, data.has_texts) == (True, True, True)
        assert (numbers(data), labels(data)) == (wanted, [i % 3 for i in wanted])
        assert [row[data.text_column] for row in data.rows] == [f"number {i}" for i in wanted]
        row = next(iter(data.rows))
        assert data.called(row, 0) == f"{wanted[0]:05}.png in {row['__url__'].rpartition('/')[2]}"


def test_given_number_of_images_is_for_streams_that_do_not_know(tmp_path):
    write_shards(tmp_path / "shards", [4])
    assert opened(tmp_path / "shards", stream_images=9).num_images == 9
    assert opened("digits", stream_images=9).num_images == 1438
    assert opened("digits", streaming=True, stream_images=9).num_images == 1438


@pytest.mark.parametrize("name", ["lab/set", "lab/set:train", "hf-hub:lab/set"])
def test_hub_is_streamed_from_its_training_split(name, data_set_hub, tmp_path):
    data = opened(name)
    assert (data.name, data.is_stream, data.label_names) == ("lab/set:train", True, ("a", "b", "c"))
    assert numbers(data) == [0, 1, 2]
    held_out = held_out_source(DataSettings(train=name, test="lab/set"), data)
    assert (held_out.name, held_out.num_images) == ("lab/set:test", None)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow")]


def test_columns_are_found_or_given(tmp_path):
    rows = {
        "image": [{"bytes": png(1), "path": None}],
        "other": [{"bytes": png(2), "path": None}],
        "label": [1],
        "kind": [0],
        "fine": [5],
        "text": ["one"],
        "words": [["two", "three"]],
        "size": [1.5],
    }
    features = datasets.Features(
        image=datasets.Image(),
        other=datasets.Image(),
        label=datasets.ClassLabel(names=["x", "y"]),
        kind=datasets.ClassLabel(names=["k"]),
        fine=datasets.Value("int32"),
        text=datasets.Value("string"),
        words=datasets.List(datasets.Value("string")),
        size=datasets.Value("float32"),
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "all.parquet")
    for streaming in (False, True):
        found = opened(tmp_path, streaming=streaming)
        assert (found.image_column, found.label_column, found.text_column) == ("image", "label", "text")
        assert found.columns == tuple(rows)
        given = opened(tmp_path, streaming=streaming, image_column="other", label_column="fine", text_column="words")
        assert (numbers(given), labels(given), given.label_names) == ([2], [5], None)
        assert next(iter(given.rows))["words"] == ["two", "three"]
        source = as_image_source(given)
        ((batch),) = source.batches(to_tensor, batch_size=1)
        assert batch.labels.tolist() == [5]
        assert torch.equal(batch.images[0], to_tensor(read_rgb({"bytes": png(2), "path": None})))
    for setting, wrong, kind in (
        ("image_column", "label", "images"),
        ("label_column", "size", "class labels, whole numbers or text"),
        ("text_column", "label", "text"),
    ):
        assert refusal(tmp_path, **{setting: "nothing"}) == (
            f"data.{setting} is 'nothing', but the columns of {tmp_path} are {', '.join(rows)}."
        )
        assert refusal(tmp_path, **{setting: wrong}).endswith(f"that column of {tmp_path} does not hold {kind}.")
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "all.parquet")
    assert "needs a column of images: name it as data.image_column (a)" in refusal(tmp_path / "all.parquet")


def test_wrong_names_are_refused(tmp_path):
    assert "there are no training data 'digit', did you mean 'digits': give an embedded set" in refusal("digit")
    assert f"there is no file {tmp_path}/a.tar." in refusal(f"{tmp_path}/a.tar")
    write_shards(tmp_path, [2, 2])
    pattern = f"{tmp_path}/train-{{0000..0002}}.tar"
    assert refusal(pattern) == f"there is no file {tmp_path}/train-0002.tar, which {pattern} asks for."
    assert "counts from 3 to 1: give the smaller number first" in refusal(f"{tmp_path}/train-{{3..1}}.tar")
    assert "is a URL, whose files cannot be listed" in refusal("http://127.0.0.1:9/train-*.tar")
    with served(tmp_path) as url:
        assert "train-9.tar cannot be read as webdataset" in refusal(f"{url}/train-9.tar")
    assert "cannot be read as webdataset" in refusal(f"{url}/train-0000.tar")  # nobody is there any more
    for content in (b"no archive", bytes(10240)):
        (tmp_path / "broken.tar").write_bytes(content)
        assert "broken.tar cannot be read as webdataset" in refusal(tmp_path / "broken.tar")
        (tmp_path / "broken.parquet").write_bytes(content)
        assert "broken.parquet cannot be read as parquet" in refusal(tmp_path / "broken.parquet")
    (tmp_path / "empty").mkdir()
    assert "there are no images below" in refusal(tmp_path / "empty")


def test_splits_in_one_folder_are_not_mixed(tmp_path):
    write_parquet(tmp_path, range(3))
    (tmp_path / "part-0.parquet").rename(tmp_path / "train-00000.parquet")
    write_parquet(tmp_path, range(3, 5))
    (tmp_path / "part-0.parquet").rename(tmp_path / "test-00000.parquet")
    assert f"holds the splits test, train: give the files of one, such as {tmp_path}/train*.parquet" in refusal(
        tmp_path
    )
    assert numbers(opened(tmp_path / "train*.parquet")) == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_labels_are_numbered_as_the_trainings(tmp_path, streaming):
    write_folder(tmp_path / "train", 8, classes=("a", "b", "c", "d"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["d", "b"]))
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "label": [i % 2 for i in range(6)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "test.parquet")
    settings = DataSettings(train=str(tmp_path / "train"), test=str(tmp_path / "test.parquet"), streaming=streaming)
    held_out = held_out_of(settings)
    assert (held_out.label_names, held_out.num_images) == (("a", "b", "c", "d"), None if streaming else 6)
    batches = list(held_out.batches(to_tensor, batch_size=4))
    pairs = {(round(float(i[0, 0, 0]) * 255), int(n)) for b in batches for i, n in zip(b.images, b.labels, strict=True)}
    assert pairs == {(i, 3 if i % 2 == 0 else 1) for i in range(6)}


def test_held_out_data_must_fit(tmp_path):
    train, test = write_folder(tmp_path / "train", 6), write_folder(tmp_path / "test", 6, classes=("a", "z"))
    assert held_out_of(DataSettings(train=str(train))) is None
    for settings, words in (
        (DataSettings(train=str(train), test=str(test)), f"{test} has the class 'z', which {train} does not have"),
        (DataSettings(train=str(train), test=str(train)), f"{train} is what is trained on: give other images"),
    ):
        with pytest.raises(DataError) as caught:
            held_out_of(settings)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    for name, highest in (("some", 2), ("more", 3)):
        rows = pandas.DataFrame({"image": [png(i) for i in range(2)], "label": [0, highest]})
        rows.to_parquet(tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("some", "more")}
    with pytest.raises(DataError, match=r"has labels up to 3, but .* has 3 classes"):
        held_out_of(DataSettings(train=files["some"], test=files["more"]))
    assert held_out_of(DataSettings(train=files["more"], test=files["some"])).has_labels
    # of columns that only the training data have nothing is asked
    assert held_out_of(DataSettings(train=files["some"], test=str(train), label_column="label")).has_labels


def test_pictures_that_are_opened_keep_their_names(tmp_path):
    write_folder(tmp_path, 3)
    picture = Image.open(tmp_path / "a" / "000.png")
    data = opened(tmp_path)
    assert data.called({"image": picture}, 5) == str(tmp_path / "a" / "000.png")
    assert data.called({"image": {"bytes": b"x", "path": "y.png"}}, 5) == "row 5 (y.png)"
    assert data.called({"image": None}, 5) == "row 5"


def classes_of(settings, needs=("labels",), seed=0):
    """The numbers that pictures tell by their class, of both parts, and what is said of them."""
    data, held_out, notes = open_data(settings, needs=needs, seed=seed)
    assert all(note.endswith(".") and "\n" not in note for note in notes)
    parts = []
    for part in (data, held_out):
        named = part and ([part.label_names[n] if n is not None else None for n in labels(part)], numbers(part))
        parts.append(named and dict(zip(named[1], named[0], strict=True)))
    return *parts, notes


def test_a_picture_beside_class_folders_does_not_count_and_is_named(tmp_path):
    train, test = (write_folder(tmp_path / name, 6) for name in ("train", "test"))
    for root in (train, test):
        (root / "sheet.png").write_bytes(png(99))
    settings = DataSettings(train=str(train), test=str(test))
    learnt, tested, notes = classes_of(settings)
    classes = {i: "abc"[i % 3] for i in range(6)}
    assert learnt == classes
    assert tested == classes | {99: None}
    assert len(notes) == 2
    for root, note in zip((train, test), notes, strict=True):
        assert note.startswith(f"{root} has images beside its class folders, which have no class and do not count: ")
        assert note.endswith("sheet.png.")
    assert classes_of(settings, needs=())[0] == classes | {99: None}  # where classes are not learnt
    (batch,) = as_image_source(open_data(settings, needs=(), seed=0)[1]).batches(to_tensor, batch_size=9)
    assert sorted(batch.labels.tolist()) == [-1, 0, 0, 1, 1, 2, 2]
    for i in range(7):  # most pictures are in no folder: they are no classes
        (test / f"{i}.png").write_bytes(png(99))
    assert not open_data(settings, needs=(), seed=0)[1].has_labels


def test_held_out_pictures_of_some_classes_are_scored_by_these(tmp_path):
    settings = DataSettings(
        train=str(write_folder(tmp_path / "train", 6)), test=str(write_folder(tmp_path / "test", 2, classes=("b",)))
    )
    _, tested, (note,) = classes_of(settings)
    assert tested == {0: "b", 1: "b"}
    assert note == f"{tmp_path / 'test'} has no images of a, c: scores are of the other 1 classes alone."


LOST = {
    "by ending": ({"1.heic": png(1), "2.HEIC": png(2)}, "d/1.heic, "),
    "by content": ({"1.png": b"no picture", "2.jpg": b""}, "d/1.png, "),
    "cut short": ({"1.png": png(1, (64, 64))[:60]}, "d/1.png)"),
    "no file": ({".hidden": b""}, "(its folder is empty)"),
}


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("others", [1, 2])
def test_a_class_without_a_readable_picture_is_named(case, others, tmp_path):
    """Also if a single class is left, which is none."""
    files, said = LOST[case]
    whole, broken = (write_folder(tmp_path / name, 6, classes=("a", "b", "d")) for name in ("whole", "broken"))
    for folder in ("bd" if others == 1 else "d")[::-1]:
        for picture in (broken / folder).iterdir():
            picture.unlink()
        for name, content in files.items():
            (broken / folder / name).write_bytes(content)
    found = {}
    for needs in ((), ("labels",)):
        found[needs] = open_data(DataSettings(train=str(whole), test=str(broken)), needs=needs, seed=0)[2]
    found["train"] = open_data(DataSettings(train=str(broken)), needs=(), seed=0)[2]
    for notes in found.values():
        (note,) = (note for note in notes if note.startswith(f"no image of d in {broken} can be read ("))
        assert said in note
    with pytest.raises(DataError) as caught:
        open_data(DataSettings(train=str(broken)), needs=("labels",), seed=0)
    assert str(caught.value).startswith(f"no image of {'bd'[others - 1]} in {broken} can be read (")
    assert str(caught.value).endswith("): save them as PNG or JPEG, or remove the class.")


def test_a_share_of_each_class_is_held_out(tmp_path):
    root = write_folder(tmp_path / "all", 22)
    (root / "d").mkdir()
    (root / "d" / "one.png").write_bytes(png(50))
    settings = DataSettings(train=str(root), held_out=0.25)
    learnt, tested, notes = classes_of(settings)
    assert not notes
    assert learnt | tested == {i: "abc"[i % 3] for i in range(22)} | {50: "d"}
    assert not learnt.keys() & tested.keys()
    assert sorted(tested.values()) == ["a", "a", "b", "b", "c", "c"]  # and not the only one of its class
    assert classes_of(settings) == (learnt, tested, notes)
    assert classes_of(settings, seed=1)[1] != tested
    streamed, held_out, _ = open_data(replace(settings, streaming=True), needs=(), seed=0)
    assert (streamed.is_stream, held_out.is_stream, set(numbers(streamed))) == (True, False, set(learnt))
    assert open_data(replace(settings, train="digits"), needs=(), seed=0)[1].num_images == 359  # digits have a test set
    write_shards(tmp_path / "shards", [4])
    with pytest.raises(DataError, match=r"is a stream, of which data\.held_out cannot choose images: give data\.test"):
        open_data(replace(settings, train=str(tmp_path / "shards")), needs=(), seed=0)
    write_folder(tmp_path / "few", 3)
    with pytest.raises(DataError, match=r"has 3 images, of which data\.held_out 0\.25 leaves none: give more"):
        open_data(replace(settings, train=str(tmp_path / "few")), needs=(), seed=0)
