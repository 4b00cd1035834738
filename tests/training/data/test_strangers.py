"""Data that a stranger made: nothing private is opened, and no small file takes much memory or time."""

import io
import json
import os
import re
import tarfile

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchvision.transforms.functional import to_tensor
from training_files import held_out_source, png, served, training_data, write_folder, write_parquet, write_shards

from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import read_rgb
from vitreg_hub.images.source import open_images
from vitreg_hub.training.data.loader import TrainLoader
from vitreg_hub.training.data.opening import as_image_source
from vitreg_hub.training.recipes.settings import DataSettings


def opened(train, **settings):
    return training_data(DataSettings(train=str(train), **settings))


def loader(data, needs=("labels",), batch_size=2):
    return TrainLoader(data=data, transform=lambda image: (to_tensor(image),), batch_size=batch_size, needs=needs)


def trained_on(data):
    """What a run and an evaluation see of data: class numbers."""
    (batch,) = loader(data, (), batch_size=data.num_images or 2).batches(0, 1)
    (other,) = as_image_source(data).batches(to_tensor, batch_size=100)
    return sorted(batch.labels.tolist()) if data.has_labels else len(other.images)


def parquet_naming(folder, *paths):
    """A parquet file whose rows name files."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    rows = {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0] * len(paths)}
    pq.write_table(pa.table(rows, schema=features.arrow_schema), folder / "x.parquet")
    return folder / "x.parquet"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["file", "url", "relative"])
def test_files_elsewhere_are_opened_on_demand_only(tmp_path, kind, streaming):
    (tmp_path / "private.png").write_bytes(png(7))
    with served(tmp_path) as url:
        name = {"file": tmp_path / "private.png", "url": f"{url}/private.png", "relative": "../private.png"}[kind]
        file = parquet_naming(tmp_path / "data", name, name)
        data = opened(file, streaming=streaming, stream_images=2)
        for read in (
            lambda: list(loader(data).batches(0, 1)),
            lambda: list(as_image_source(data).batches(to_tensor, batch_size=2, skip_unreadable=True)),
        ):
            with pytest.raises(DataError, match=r"not below .*/data: .*train with data\.allow_remote") as caught:
                read()
            assert str(name) in str(caught.value)
        if kind != "relative":
            allowed = opened(file, streaming=streaming, stream_images=2, allow_remote=True)
            assert next(iter(as_image_source(allowed).batches(to_tensor, batch_size=2))).images[0, 0, 0, 0] * 255 == 7


def test_files_of_the_own_folder_are_opened(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "a.png").write_bytes(png(7))
    for name in ("deep/a.png", tmp_path / "data" / "deep" / "a.png"):
        data = opened(parquet_naming(tmp_path / "data", name))
        assert read_rgb(data.rows[0]["image"], within=data.within).getpixel((0, 0))[0] == 7


@pytest.mark.parametrize("values", [["dog", "cat", "dog", "eel"], [True, False, True, True], ["10", None, "9", "9"]])
def test_labels_in_words_are_numbered_by_their_order(values, tmp_path):
    pandas.DataFrame({"image": [png(i) for i in range(4)], "label": values}).to_parquet(tmp_path / "x.parquet")
    data = opened(tmp_path / "x.parquet")
    names = tuple(sorted({str(value) for value in values if value is not None}))
    assert (data.label_names, data.num_classes, data.has_labels) == (names, len(names), True)
    found = {i: row[data.label_column] for i, row in enumerate(data.rows)}
    assert [None if n is None else names[n] for n in found.values()] == [v if v is None else str(v) for v in values]
    assert trained_on(data) == sorted(-1 if value is None else names.index(str(value)) for value in values)
    explicit = opened(tmp_path / "x.parquet", label_column="label")
    assert (explicit.label_names, explicit.label_column) == (names, data.label_column)


def test_words_of_both_sides_mean_the_same_classes(tmp_path):
    for name, values in (("train", ["b", "a", "c"]), ("test", ["c", "b", "c"])):
        frame = pandas.DataFrame({"image": [png(i) for i in range(3)], "label": values})
        frame.to_parquet(tmp_path / f"{name}.parquet")
    settings = DataSettings(train=str(tmp_path / "train.parquet"), test=str(tmp_path / "test.parquet"))
    held_out = held_out_source(settings, training_data(settings))
    (batch,) = held_out.batches(to_tensor, batch_size=3)
    assert (held_out.label_names, batch.labels.tolist()) == (("a", "b", "c"), [2, 1, 2])


def test_words_that_are_no_classes(tmp_path):
    texts = [f"a caption of number {i}" for i in range(4)]
    pandas.DataFrame({"image": [png(i) for i in range(4)], "text": texts}).to_parquet(tmp_path / "x.parquet")
    data = opened(tmp_path)
    assert (data.label_column, data.text_column) == (None, "text")
    with pytest.raises(DataError, match=r"words, which a stream cannot number: leave data\.streaming out"):
        opened(tmp_path, streaming=True, label_column="text")


def claims(tmp_path, metadata=None, label=None):
    """A parquet file with an image of its own in every row, and what its columns and its footer say besides."""
    labels = [0, 10**12] if label is None else label
    table = pa.table({"image": [png(i) for i in range(2)], "label": labels})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(table, tmp_path / "x.parquet")
    return tmp_path / "x.parquet"


IMAGE = {"_type": "Image"}
REFUSED = {
    "has the label 1000000000000, but only 2 images": lambda p: claims(p),
    "has the label 18446744073709551615": lambda p: claims(p, label=pa.array([0, 2**64 - 1], pa.uint64())),
    "has class labels without their names": lambda p: claims(
        p, {"image": IMAGE, "label": {"_type": "ClassLabel", "num_classes": 10**12}}
    ),
    "class labels without their names: store": lambda p: claims(
        p, {"image": IMAGE, "label": {"_type": "ClassLabel", "names_file": "/etc/passwd"}}
    ),
    r"has a class called 'a\\ud800'": lambda p: claims(
        p, {"image": IMAGE, "label": {"_type": "ClassLabel", "names": ["a\ud800", "b"]}}, label=[0, 1]
    ),
    r"has a class called '\\x1b\[2J'": lambda p: claims(p, label=["\x1b[2J", "b"]),
    "cannot be read as parquet": lambda p: claims(p, {"image": IMAGE, "label": {"_type": "Nothing"}}),
}


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize("says", REFUSED)
def test_claims_of_parquet_files_are_bounded(says, tmp_path):
    file = REFUSED[says](tmp_path)
    for streaming in (False, True) if "class" in says and "x1b" not in says else (False,):
        with pytest.raises(DataError, match=says) as caught:
            opened(file, streaming=streaming)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_rows_without_end_are_refused(tmp_path):
    rows = 10**6
    table = pa.table({"image": pa.nulls(rows, pa.binary()), "label": pa.array(np.zeros(rows, dtype=np.int64))})
    pq.write_table(table, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10**5
    with pytest.raises(DataError, match=r"hold 1,000,000 rows, .* made to fill the memory"):
        opened(tmp_path)


def test_labels_of_a_stream_are_bounded(tmp_path):
    data = opened(claims(tmp_path, label=pa.array([2**64 - 1, 0], pa.uint64())), streaming=True, stream_images=2)
    with pytest.raises(DataError, match="has the label 18446744073709551615"):
        list(loader(data).batches(0, 1))
    with pytest.raises(DataError, match="has the label 18446744073709551615"):
        list(as_image_source(data).batches(to_tensor, batch_size=2))


@pytest.mark.parametrize("name", ["a/x.png", "x.parquet", "x.tar"])
def test_pipes_are_not_waited_for(name, tmp_path):
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / name)
    if name == "a/x.png":
        data = opened(tmp_path)
        with pytest.raises(DataError, match="cannot be read"):
            list(loader(data, (), batch_size=1).batches(0, 1))
        with pytest.raises(DataError, match=r"x\.png\) cannot be read: it is not an ordinary file"):
            list(open_images(tmp_path).batches(to_tensor, batch_size=1))
        return
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match="is not an ordinary file"):
            opened(given)


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\x1b[2Jb", b"a\nb"])
def test_odd_names_are_refused(name, tmp_path):
    for odd in (os.fsencode(tmp_path) + b"/" + name + b"/x.png", os.fsencode(tmp_path) + b"/b/" + name + b".png"):
        write_folder(tmp_path, 4)
        os.makedirs(os.path.dirname(odd), exist_ok=True)
        with open(odd, "wb") as file:
            file.write(png(1))
        for opening in (opened, open_images):
            with pytest.raises(DataError, match="not UTF-8 or holds control characters: rename") as caught:
                opening(str(tmp_path))
            assert str(caught.value).isprintable()
        os.remove(odd)


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "\ud800", "/proc/1/root/x" * 300])
def test_names_that_no_file_can_have(name):
    for opening in (opened, open_images):
        with pytest.raises(DataError, match=r"there are no (images|training data)"):
            opening(name)


def test_folders_that_hold_themselves_or_cannot_be_read(tmp_path, monkeypatch, caplog):
    write_folder(tmp_path / "data", 4)
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "a").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "c").symlink_to(tmp_path / "data" / "c")  # which comes before what it leads to
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "more.png").write_bytes(png(9))
    (tmp_path / "others" / "again").symlink_to(tmp_path / "others")
    (tmp_path / "data" / "b" / "others").symlink_to(tmp_path / "others")
    assert open_images(tmp_path / "data").num_images == opened(tmp_path / "data").num_images == 5
    assert opened(tmp_path / "data").label_names == ("a", "b", "c")
    for link in ("a/up", "b/a", "a/c", "again"):
        assert f"{link} is a link to a folder that is read anyway, and is not followed" in caplog.text
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"data/b cannot be read \(Permission denied\): look at its permissions"):
        opened(tmp_path / "data")


def test_keys_with_dots_are_no_columns(tmp_path):
    with tarfile.open(tmp_path / "train-0000.tar", "w") as tar:
        for key in ("img.v1.0", "img.v1.1"):
            for ending, content in (("png", png(1)), ("cls", b"1")):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for column in (None, "v1.0.png"):
        with pytest.raises(DataError, match=r"columns v1.0.png and v1.1.png: in shards a key ends at its first dot"):
            opened(tmp_path / "train-0000.tar", image_column=column)


def test_members_of_archives_that_cannot_be_decoded(tmp_path):
    for ending, content in (("pth", b"no weights"), ("npy", b"\x93NUMPY"), ("json", b"[" * 10**5), ("msg", b"\xc1")):
        write_shards(tmp_path / ending, [2], **{ending: lambda number, content=content: content})
        with pytest.raises(DataError, match="cannot be read as webdataset"):
            opened(tmp_path / ending)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("x.png", "y.png"), "they lie in no folders: put those of each class into a folder"),
        (("in/cat/x.png", "in/dog/y.png"), r"all of them lie in its one folder in: give .*/in\."),
        (("cat/x.png", "cat/y.png"), "all of them lie in the folder cat: add a folder for each other class"),
        (("cat/x.png", "dog/y.png", "z.png", "w.png"), "some lie beside the folders cat, dog, "),
    ],
)
def test_folders_without_classes_name_the_likely_mistake(names, says, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))} have no classes, which this task needs: {says}"):
        loader(opened(tmp_path))


def test_a_model_is_no_folder_of_images(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="it holds a model, which is no data"):
        open_images(tmp_path)


def test_numbers_in_patterns_are_bounded(tmp_path):
    write_parquet(tmp_path, range(2))
    for last in ("999999999999", "9" * 5000):
        with pytest.raises(DataError, match="stands for more than 100,000 files"):
            opened(f"{tmp_path}/part-{{0..{last}}}.parquet")
