"""Images of every form, against Pillow, torchvision and the data sets' own iteration."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from pictures import data_set, picture
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import photos
from vitreg_hub.images.pictures import to_rgb
from vitreg_hub.images.source import open_images


def read(source, transform=to_tensor, *, batch_size=4, **options):
    """Indices, images and labels of all batches in a row."""
    batches = list(source.batches(transform, batch_size=batch_size, **options))
    assert all(len(batch.images) == len(batch.indices) <= batch_size for batch in batches)
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches]).tolist() if batches[0].labels is not None else None
    return torch.cat([batch.indices for batch in batches]).tolist(), images, labels


def numbers(images):
    """The numbers that pictures tell."""
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def test_embedded_data_set_is_read_in_order():
    source, own = open_images("photos", max_images=40), photos()
    assert (open_images("photos").name, open_images("photos").num_images) == ("photos", 238)
    assert (source.has_labels, source.label_names) == (True, tuple(own.features["label"].names))
    indices, images, labels = read(source, batch_size=7)
    assert torch.equal(images, torch.stack([to_tensor(row["image"]) for row in own.select(indices)]))
    assert labels == own.select(indices)["label"][:]


def test_digits_are_the_test_split():
    assert open_images("digits").num_images == 359


@pytest.mark.parametrize("form", ["tensor", "pictures", "data set", "stream", "folder"])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_processes_together_read_each_image_once(form, world_size, num_workers, tmp_path):
    count = 11
    pictures = [picture(i) for i in range(count)]
    if form == "tensor":
        images = torch.stack([to_tensor(p) for p in pictures])
    elif form == "pictures":
        images = pictures
    elif form == "data set":
        images = data_set(count)
    elif form == "stream":
        images = data_set(count).to_iterable_dataset(num_shards=2)
    else:
        for i, p in enumerate(pictures):
            p.save(tmp_path / f"{i:02}.png")
        images = tmp_path
    source = open_images(images)
    assert source.num_images == (None if form == "stream" else count)
    assert source.has_labels == (form in ("data set", "stream"))
    for _ in range(2):  # a source can be read again
        shares = [read(source, rank=r, world_size=world_size, num_workers=num_workers) for r in range(world_size)]
        found = sorted(itertools.chain.from_iterable(indices for indices, _, _ in shares))
        assert found == list(range(count))
        for indices, images, labels in shares:
            assert numbers(images) == indices
            assert labels == ([i % 3 for i in indices] if source.has_labels else None)


def test_more_processes_than_images():
    source = open_images([picture(0)])
    assert not list(source.batches(to_tensor, batch_size=2, rank=1, world_size=2))


def test_reading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    read(open_images([picture(0), picture(1)], max_images=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_are_not_transformed():
    images = torch.randn(5, 3, 2, 2)
    indices, found, labels = read(open_images(images), None, batch_size=2)
    assert indices == [0, 1, 2, 3, 4]
    assert torch.equal(found, images)
    assert labels is None


def test_pictures_need_a_transform():
    with pytest.raises(DataError, match="preprocessing is unknown"):
        read(open_images([picture(0)]), None)


@pytest.mark.parametrize("images", [torch.zeros(3, 4, 4), [torch.zeros(4, 4)] * 2, torch.zeros(2, 3, 4, 4).byte()])
def test_other_tensors_are_refused(images):
    with pytest.raises(DataError, match=r"must be \[N, 3, H, W\] of floating-point"):
        open_images(images)


@pytest.mark.parametrize(
    "images", [[], {}, [1], 3, np.array(["a"]), [np.zeros((4, 4, 2), np.uint8)], datasets.DatasetDict()]
)
def test_other_forms_are_refused(images):
    with pytest.raises(DataError, match="cannot be read as images: give an embedded data set"):
        open_images(images)


def test_nothing_is_no_source():
    with pytest.raises(DataError, match="holds no images"):
        open_images(torch.zeros(0, 3, 4, 4))
    with pytest.raises(DataError, match="max_images is 0"):
        open_images([picture(0)], max_images=0)


def test_subset_is_random_sorted_and_seeded():
    subsets = [read(open_images(data_set(40), max_images=10, seed=seed)) for seed in (0, 0, 1)]
    (indices, images, labels), (again, _, _), (other, _, _) = subsets
    assert len(set(indices)) == 10
    assert indices == sorted(indices) == again != other
    assert indices != list(range(10))
    assert numbers(images) == indices
    assert labels == [i % 3 for i in indices]
    assert open_images(data_set(40), max_images=10).num_images == 10
    assert open_images(data_set(4), max_images=10).num_images == 4


def test_subset_is_uniform():
    counts = np.zeros(20)
    for seed in range(400):
        counts[list(open_images(torch.zeros(20, 3, 1, 1), max_images=5, seed=seed).picked)] += 1
    # 400 draws with chance 1/4: mean 100, standard deviation 8.7; five of those on either side
    assert 56 < counts.min() <= counts.max() < 144


def test_stream_is_limited_to_its_first_images():
    source = open_images(data_set(9).to_iterable_dataset(), max_images=5)
    assert read(source)[0] == [0, 1, 2, 3, 4]
    assert read(source, rank=1, world_size=2)[0] == [1, 3]


def test_endless_stream_is_read_as_far_as_needed():
    def rows():
        for number in itertools.count():
            yield {"image": picture(number % 256), "label": number}

    source = open_images(datasets.IterableDataset.from_generator(rows))
    batches = source.batches(to_tensor, batch_size=3, num_workers=2)
    for step, batch in enumerate(itertools.islice(batches, 4)):
        assert batch.indices.tolist() == [3 * step, 3 * step + 1, 3 * step + 2]
        assert batch.labels.tolist() == batch.indices.tolist()
        assert numbers(batch.images) == batch.indices.tolist()


def test_stream_with_features_is_not_read_ahead(tmp_path):
    log = tmp_path / "log"

    def rows():
        for number in range(100):
            with log.open("a") as file:
                file.write(".")
            yield {"image": picture(number)}

    stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features(image=datasets.Image()))
    batches = open_images(stream).batches(to_tensor, batch_size=5)
    next(batches)
    assert log.stat().st_size <= 6


# folders


def fill(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)


def test_folder_of_classes_is_torchvisions(tmp_path):
    fill(tmp_path, "dog/2.png", "dog/10.jpg", "cat/a.PNG", "cat/deep/er/b.jpeg", "bird/x.webp", "bird/y.bmp")
    (tmp_path / "elsewhere").mkdir()
    theirs = ImageFolder(tmp_path, allow_empty=True)
    source = open_images(str(tmp_path))
    assert source.name == str(tmp_path)
    assert source.label_names == ("bird", "cat", "dog")  # elsewhere holds no images
    _, images, labels = read(source)
    expected = {
        path: (to_tensor(image), theirs.classes[label])
        for (path, _), (image, label) in zip(theirs.samples, theirs, strict=True)
    }
    paths = [row["path"] for row in source.rows["image"]]
    assert sorted(paths) == sorted(expected)
    for path, image, label in zip(paths, images, labels, strict=True):
        assert torch.equal(image, expected[path][0])
        assert source.label_names[label] == expected[path][1]


@pytest.mark.parametrize(
    "names", [("b.png", "a.png"), ("b.png", "d.png", "x/a.png", "y/c.png"), ("x/a.png", "x/b.png")], ids=str
)
def test_folder_without_classes_has_no_labels(names, tmp_path):
    fill(tmp_path, *names)
    source = open_images(tmp_path)
    assert (source.num_images, source.has_labels, source.label_names) == (len(names), False, None)
    assert sorted(numbers(read(source)[1])) == list(range(len(names)))


def test_folder_ignores_what_is_no_image_and_follows_links(tmp_path):
    fill(tmp_path / "else", "a.png")
    fill(tmp_path / "images", "x/a.png", "x/.hidden.png", ".thumbnails/a.png", "__MACOSX/x/a.png")
    (tmp_path / "images" / "x" / "notes.txt").write_text("no image")
    (tmp_path / "images" / "y").symlink_to(tmp_path / "else")
    source = open_images(tmp_path / "images")
    assert (source.num_images, source.label_names) == (2, ("x", "y"))


def test_folder_leaves_nothing_behind(tmp_path):
    fill(tmp_path, "x/a.png", "y/b.png")
    cache = datasets.config.HF_DATASETS_CACHE
    before = sorted(cache.rglob("*")) if cache.exists() else []
    read(open_images(tmp_path))
    assert (sorted(cache.rglob("*")) if cache.exists() else []) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "b.png", "x", "y"]


def test_folder_of_splits_is_refused(tmp_path):
    fill(tmp_path, "train/x/a.png", "val/x/b.png")
    with pytest.raises(DataError, match="holds the splits train, val: give one of them"):
        open_images(tmp_path)
    assert open_images(tmp_path / "val").num_images == 1


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there are no images below .*: their names must end in \.jpg"):
        open_images(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "gone"])
def test_broken_file_is_named(damage, num_workers, tmp_path):
    fill(tmp_path, "a.png", "b.png", "c.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    noise.save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    source = open_images(tmp_path)
    if damage == "gone":
        (tmp_path / "b.png").unlink()
    else:
        (tmp_path / "b.png").write_bytes({"cut": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[damage])
    with pytest.raises(DataError, match=rf"image 1 of {tmp_path} \({tmp_path}/b\.png\) cannot be read") as caught:
        read(source, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_missing_picture_of_a_data_set_is_named():
    features = datasets.Features(image=datasets.Image())
    rows = datasets.Dataset.from_dict({"image": [picture(0), None]}, features=features)
    with pytest.raises(DataError, match="image 1 of rows cannot be read: it is NoneType, not a picture"):
        read(open_images(rows, name="rows"))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("batch_size", "pair"), [(4, "0 and 3"), (3, "0 and 3"), (2, "2 and 3")])
def test_unequal_sizes_are_named(batch_size, pair, num_workers):
    source = open_images([*(picture(i) for i in range(3)), picture(3, (5, 4))], name="mine")
    with pytest.raises(DataError, match=f"images {pair} of mine have 4x6 and 4x5 pixels after preprocessing"):
        read(source, batch_size=batch_size, num_workers=num_workers)


# pixels


def test_grayscale_palette_and_cmyk_keep_their_colours():
    for mode in ("L", "P", "CMYK", "YCbCr", "1"):
        image = picture(200, mode=mode)
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["I;16", "I;16B"])
def test_sixteen_bits_keep_their_upper_half(kind):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    image = Image.frombytes(kind, (16, 16), values.astype(">u2" if kind.endswith("B") else "<u2").tobytes())
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(to_rgb(image)), np.stack([expected] * 3, axis=-1))


def test_sixteen_bit_file_is_read(tmp_path):
    Image.fromarray(np.full((4, 6), 0x80FF, dtype=np.uint16)).save(tmp_path / "a.png")
    assert numbers(read(open_images(tmp_path))[1]) == [0x80]


def test_pictures_are_upright_as_their_camera_says(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    with Image.open(tmp_path / "turned.jpg") as picture:
        from_list = next(open_images([picture]).batches(to_tensor, batch_size=1)).images[0]
    from_folder = next(open_images(tmp_path).batches(to_tensor, batch_size=1)).images[0]
    for image in (from_list, from_folder):
        assert image.shape == (3, 16, 8)
        assert image[:, :7].min() > 0.9  # bright above
        assert image[:, 9:].max() < 0.1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_show_white(mode):
    image = Image.new("RGBA", (6, 4))
    image.putalpha(Image.fromarray(np.array([[0, 255] * 3] * 4, dtype=np.uint8)))
    if mode == "P":
        image = Image.new("P", (6, 4), 1)
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.paste(0, (0, 0, 1, 4))
        image.info["transparency"] = 0
    else:
        image = image.convert(mode)
    pixels = np.asarray(to_rgb(image))
    assert (pixels[:, 0] == 255).all()
    assert (pixels[:, 1] == 0).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(kind):
    with pytest.raises(DataError, match=r"image 0 of pictures cannot be read: pixels of kind [FI] have no known"):
        read(open_images([Image.fromarray(np.zeros((4, 4), dtype=kind))]))


def test_rotated_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[274] = 6  # to be shown after a quarter turn clockwise
    image.save(tmp_path / "a.png", exif=exif)
    (turned,) = read(open_images(tmp_path))[1]
    assert torch.equal(turned, to_tensor(image.rotate(-90, expand=True)))


# columns


@pytest.mark.parametrize(
    ("columns", "label_names", "has_labels"),
    [
        (dict(label=datasets.Value("int64")), None, True),
        (dict(label=datasets.Value("string")), ("0", "1"), True),
        (dict(label=datasets.Value("bool")), ("False", "True"), True),
        (dict(label=datasets.ClassLabel(names=["x", "y"])), ("x", "y"), True),
        (dict(kind=datasets.ClassLabel(names=["x", "y"]), label=datasets.Value("string")), ("x", "y"), True),
        (dict(fine=datasets.ClassLabel(num_classes=2), coarse=datasets.ClassLabel(num_classes=2)), None, False),
        (dict(other=datasets.ClassLabel(num_classes=2), label=datasets.ClassLabel(names=["x", "y"])), ("x", "y"), True),
        (dict(number=datasets.Value("int64")), None, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_labels(columns, label_names, has_labels, streaming):
    values = {name: ["1", "0"] if feature.dtype == "string" else [1, 0] for name, feature in columns.items()}
    words = len(columns) == 1 and columns.get("label") in (datasets.Value("string"), datasets.Value("bool"))
    if words and streaming:  # whose names are known at its end only
        label_names, has_labels = None, False
    features = datasets.Features(picture=datasets.Image(), **columns)
    rows = datasets.Dataset.from_dict({"picture": [picture(0), picture(1)], **values}, features=features)
    source = open_images(rows.to_iterable_dataset() if streaming else rows)
    assert (source.has_labels, source.label_names) == (has_labels, label_names)
    assert read(source)[2] == ([1, 0] if has_labels else None)


def test_hidden_label_is_minus_one():
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x"]))
    rows = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "label": [None, 0]}, features=features)
    assert read(open_images(rows))[2] == [-1, 0]


def test_column_of_images():
    image, two = datasets.Image(), {"mask": [picture(1)], "image": [picture(0)]}
    rows = datasets.Dataset.from_dict(two, features=datasets.Features(mask=image, image=image))
    assert numbers(read(open_images(rows))[1]) == [0]
    for wrong in (rows.rename_column("image", "depth"), datasets.Dataset.from_dict({"x": [1]})):
        with pytest.raises(DataError, match="needs one column of images, or one called 'image'"):
            open_images(wrong)


def test_formatted_data_set_is_read_as_it_is_stored():
    rows = data_set(3)
    for formatted in (rows.with_format("torch"), rows.with_transform(lambda batch: {"x": [0] * len(batch["label"])})):
        assert numbers(read(open_images(formatted))[1]) == [0, 1, 2]
    assert rows.features["image"].decode


# names


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fotos", "there are no images 'fotos', did you mean 'photos': give an embedded data set"),
        ("nothing here", "there are no images 'nothing here': give"),
        ("a/b/c", "there are no images 'a/b/c': give"),
        ("org/name", "there is no folder org/name, and no such data set on the Hub can be read"),
        (__file__, "is a file: give its folder"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(DataError, match=says) as caught:
        open_images(name)
    assert "\n" not in str(caught.value)


def test_given_name_is_used(tmp_path):
    fill(tmp_path, "a.png")
    assert [open_images(form, name="mine").name for form in ("digits", tmp_path, [picture(0)])] == ["mine"] * 3


@pytest.mark.parametrize(
    ("name", "called", "count"),
    [("lab/set", "lab/set:test", 7), ("lab/set:train", "lab/set:train", 3), ("hf-hub:lab/set", "lab/set:test", 7)],
)
def test_data_set_on_the_hub_is_streamed(name, called, count, data_set_hub, tmp_path):
    source = open_images(name)
    assert (source.name, source.num_images, source.label_names) == (called, None, ("a", "b", "c"))
    for _ in range(2):
        indices, images, labels = read(source, num_workers=1)
        assert indices == numbers(images) == list(range(count))
        assert labels == [i % 3 for i in range(count)]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".arrow")]


def test_wrong_split_and_wrong_repository(data_set_hub):
    with pytest.raises(DataError, match="lab/set has the splits train, test: name one, as lab/set:train"):
        open_images("lab/set:nothing")
    with pytest.raises(DataError, match="there is no folder lab/nothing, and no such data set on the Hub can be read"):
        open_images("lab/nothing")
