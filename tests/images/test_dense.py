"""Pictures with masks, depths and boxes, from every form in which they come."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from vitreg_hub.errors import DataError
from vitreg_hub.images.dense import Annotated, open_annotated, require_classes
from vitreg_hub.images.known import KNOWN

SIZES = [(5, 4), (8, 6), (7, 7)]
"""Widths and heights."""

MASKS = [np.arange(h * w, dtype=np.uint8).reshape(h, w) % 5 for w, h in SIZES]
DEPTHS = [1 + np.arange(h * w, dtype=np.float32).reshape(h, w) / 8 for w, h in SIZES]
BOXES = [[[0, 1, 3, 4]], [[1, 1, 4, 5], [2, 0, 8, 6]], []]
NAMES = ["a", "c.d", "deep/b"]


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)


def save_images(folder, names=NAMES):
    for (width, height), name in zip(SIZES, names, strict=True):
        save(folder / f"{name}.png", np.full((height, width, 3), 90, np.uint8))


def palette(mask):
    picture = Image.fromarray(mask, "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9, 7, 7, 7])
    return picture


def found(source, kind):
    return [getattr(picture, kind) for picture in source.pictures()]


def assert_equal(arrays, expected):
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("write", [palette, Image.fromarray, np.asarray])
@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images", "masks", None),
        ("images", "annotations", None),
        ("images", "labels", None),
        ("images/training", "annotations/training", "train"),
        ("val/images", "val/masks", "validation"),
        ("rgb", "mask", None),
    ],
)
def test_masks_of_paired_folders_are_read_as_stored(tmp_path, images, masks, split, write):
    save_images(tmp_path / images)
    for mask, name in zip(MASKS, NAMES, strict=True):
        written = write(mask)
        save(tmp_path / masks / f"{name}.{'npy' if isinstance(written, np.ndarray) else 'png'}", written)
    source = open_annotated(tmp_path, "mask", split=split)
    assert len(source) == 3
    assert source.targets == ("mask",)
    assert_equal(found(source, "mask"), MASKS)
    assert all(mask.dtype == np.int64 for mask in found(source, "mask"))
    assert source[1].name == str(tmp_path / images / "c.d.png")
    assert source[0].image.mode == "RGB"
    fewer, every = found(source.at_most(2, seed=1), "index"), found(source, "index")
    assert (every, fewer) in [([0, 1, 2], pair) for pair in ([0, 1], [0, 2], [1, 2])]


@pytest.mark.parametrize("folder", ["depth", "depths"])
@pytest.mark.parametrize("ending", ["png", "npy"])
def test_depths_are_metres(tmp_path, folder, ending):
    save_images(tmp_path / "images")
    for depth, name in zip(DEPTHS, NAMES, strict=True):
        depth = np.where(depth > 1.1, depth, 0)
        save(tmp_path / folder / f"{name}.{ending}", depth if ending == "npy" else (depth * 256).astype(np.uint16))
    source = open_annotated(tmp_path, "depth", depth_scale=256 if ending == "png" else None)
    assert_equal(found(source, "depth"), [np.where(depth > 1.1, depth, 0) for depth in DEPTHS])
    assert source[0].depth.dtype == np.float32


def test_depths_that_are_no_number_are_unknown(tmp_path):
    save(tmp_path / "images" / "a.png", np.zeros((1, 3, 3), np.uint8))
    save(tmp_path / "depth" / "a.npy", np.array([[np.nan, -1.0, 2.0]]))
    assert open_annotated(tmp_path, "depth")[0].depth.tolist() == [[0, 0, 2]]


def coco(folder, path="annotations/instances_val.json", **changes):
    images = [{"id": 7 * i, "file_name": f"{name}.png"} for i, name in enumerate(NAMES)]
    annotations = [
        {"image_id": 7 * i, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": 0}
        for i, boxes in enumerate(BOXES)
        for x0, y0, x1, y1 in boxes
    ]
    annotations.append({"image_id": 0, "bbox": [0, 0, 1, 1], "iscrowd": 1})
    save(folder / path, json.dumps({"images": images, "annotations": annotations, **changes}))
    return folder / path


@pytest.mark.parametrize("images", ["images", "val", "images/val", "."])
def test_boxes_of_coco_without_crowds(tmp_path, images):
    save_images(tmp_path / images)
    file = coco(tmp_path)
    for data, split in ((tmp_path, None), (file, None), (tmp_path, "validation")):
        assert_equal(
            found(open_annotated(data, "boxes", split=split), "boxes"), [np.reshape(b, (-1, 4)) for b in BOXES]
        )


def voc(folder, xml=None):
    names = ["a", "b", "c"]
    save_images(folder / "JPEGImages", names)
    for name, boxes in zip(names, BOXES, strict=True):
        objects = "".join(
            f"<object><name>cat</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
            f"<ymax>{y1}</ymax></bndbox><part><bndbox><xmin>1</xmin></bndbox></part></object>"
            for x0, y0, x1, y1 in boxes
        )
        save(folder / "Annotations" / f"{name}.xml", xml or f"<annotation><folder>..</folder>{objects}</annotation>")
        save(folder / "SegmentationClass" / f"{name}.png", palette(MASKS[names.index(name)]))
    save(folder / "ImageSets" / "Main" / "trainval.txt", "c\na\n")
    save(folder / "ImageSets" / "Main" / "cat_train.txt", "a -1\nb  1\n")
    save(folder / "ImageSets" / "Segmentation" / "val.txt", "b\n")


def test_boxes_and_masks_of_pascal_voc(tmp_path):
    voc(tmp_path)
    every = [np.reshape(boxes, (-1, 4)) for boxes in BOXES]
    assert_equal(found(open_annotated(tmp_path, "boxes"), "boxes"), every)
    assert_equal(found(open_annotated(tmp_path, "boxes", split="trainval"), "boxes"), [every[2], every[0]])
    assert_equal(found(open_annotated(tmp_path, "boxes", split="cat_train"), "boxes"), [every[1]])
    assert_equal(found(open_annotated(tmp_path, "mask"), "mask"), MASKS)
    assert_equal(found(open_annotated(tmp_path, "mask", split="validation"), "mask"), [MASKS[1]])
    (tmp_path / "SegmentationClass" / "a.png").unlink()  # most pictures of VOC have none
    assert len(open_annotated(tmp_path, "mask")) == 2


def rows_of(**columns):
    images = [Image.new("RGB", size) for size in SIZES]
    kinds = {"image": datasets.Image(), "mask": datasets.Image(), "annotation": datasets.Image()}
    kinds |= {"depth_map": datasets.Image()}
    features = datasets.Features({name: kinds[name] for name in ("image", *columns) if name in kinds})
    data = datasets.Dataset.from_dict(
        {"image": images, **{name: column for name, column in columns.items() if name in kinds}}, features=features
    )
    for name in columns.keys() - kinds.keys():
        data = data.add_column(name, columns[name])
    return data


@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_a_data_set(stream):
    sized = [[[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes] for boxes in BOXES]
    data = rows_of(
        annotation=[palette(mask) for mask in MASKS],
        depth_map=[Image.fromarray(depth) for depth in DEPTHS],  # TIFF of floating-point numbers, as NYUv2 is stored
        objects=[{"bbox": boxes} for boxes in sized],
        corners=BOXES,
        text=["one", "two", "three"],
        label=[2, 1, 0],
    )
    data = data.to_iterable_dataset() if stream else data
    source = open_annotated(data, "mask")
    assert source.targets == ("mask", "depth", "boxes")
    assert_equal(found(source, "mask"), MASKS)
    assert_equal(found(source, "boxes"), [np.reshape(boxes, (-1, 4)) for boxes in BOXES])
    assert_equal(found(open_annotated(data, "depth"), "depth"), DEPTHS)
    again = open_annotated(data, "boxes", columns={"boxes": "corners"})
    assert_equal(found(again, "boxes"), [np.reshape(boxes, (-1, 4)) for boxes in BOXES])
    assert found(source, "caption") == ["one", "two", "three"]
    assert found(source, "label") == [2, 1, 0]
    assert found(source.at_most(2), "index") == [0, 1] or not stream
    assert [p.index for rank in (0, 1) for p in source.pictures(rank=rank, world_size=2)] == [0, 2, 1]
    if stream:
        for use in (lambda: source[0], lambda: len(source)):
            with pytest.raises(DataError, match="is a stream"):
                use()


def test_workers_change_nothing_and_errors_keep_their_sentence(tmp_path):
    source = open_annotated("scenes", "depth", split="test", max_images=5, seed=3)
    alone, helped = list(source.pictures()), list(source.pictures(num_workers=1))
    assert [p.index for p in alone] == [p.index for p in helped] == sorted({p.index for p in alone})
    assert_equal([p.depth for p in helped], [p.depth for p in alone])
    save_images(tmp_path / "images")
    save_images(tmp_path / "masks")
    with pytest.raises(DataError, match=r"^the mask of .*a\.png cannot be read"):
        list(open_annotated(tmp_path, "mask").pictures(num_workers=1))


def test_scenes_have_every_target():
    train, test = (open_annotated("scenes", "mask", split=split, max_images=3) for split in ("train", "test"))
    assert train.class_names == ("background", "circle", "square", "triangle", "star", "cross", "ring")
    assert test.targets == ("mask", "depth", "boxes")
    picture = test[0]
    assert 1 < picture.depth[picture.mask > 0].max() <= 3
    assert picture.name == f"image {picture.index} of scenes"
    require_classes(picture, 7)


def test_known_data_are_streamed_with_their_columns(monkeypatch):
    asked = []
    rows = rows_of(annotation=[palette(mask) for mask in MASKS]).to_iterable_dataset()

    def load_dataset(path, streaming, **options):
        asked.append((path, streaming, options))
        return {"validation": rows, "train": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = open_annotated("ade20k", "mask", max_images=2)
    assert source.name == "merve/scene_parse_150:validation"
    assert_equal(found(source, "mask"), MASKS[:2])
    with pytest.raises(DataError, match=r"has no column objects\.bboxes, but image, annotation"):
        open_annotated("voc2007:train", "boxes")
    options = {"name": "voc2007_main", "revision": "refs/convert/parquet"}
    assert asked == [("merve/scene_parse_150", True, {}), ("HuggingFaceM4/pascal_voc", True, options)]
    assert {"imagenet-1k", "ade20k", "nyuv2", "voc2007", "voc2012", "coco"} <= KNOWN.keys()


def paired(folder, target="masks", content=MASKS[0], name="a.png"):
    save(folder / "images" / "a.png", np.zeros((4, 5, 3), np.uint8))
    save(folder / target / name, content)
    return folder


def broken_voc(folder, xml):
    voc(folder, xml)
    return folder


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb">]><annotation><object>&b;</object></annotation>'

WRONG = {
    "sizes": (lambda f: paired(f, content=MASKS[1]), "mask", {}, r"the mask of .*a\.png has 8 x 6 pixels.* has 5 x 4"),
    "colours": (lambda f: paired(f, content=np.zeros((4, 5, 3), np.uint8)), "mask", {}, r"a\.png .*colours \(RGB\)"),
    "floats": (lambda f: paired(f, content=DEPTHS[0], name="a.npy"), "mask", {}, "number of a class for each pixel"),
    "pickles": (lambda f: paired(f, "depth", "x", "a.npy"), "depth", {}, r"the depth of .*a\.png cannot be read"),
    "scale": (lambda f: paired(f, "depth"), "depth", {}, r"the depth of .*a\.png: .*give depth_scale"),
    "no scale": (lambda f: paired(f, "depth"), "depth", {"depth_scale": 0}, "depth_scale is 0"),
    "alone": (lambda f: paired(f, name="b.png"), "mask", {}, r"images/a\.png has no mask: put a file .*masks"),
    "twice": (lambda f: paired(paired(f), name="a.npy"), "mask", {}, r"both .*a\.npy and .*a\.png"),
    "no folder": (lambda f: paired(f, "mess"), "mask", {}, r"has no folder masks or .*, but images, mess"),
    "splits": (lambda f: paired(f, "masks/val", name="a.png"), "mask", {}, r"holds the splits val: give one"),
    "no split": (paired, "mask", {"split": "test"}, r"no folder images .* for the split test"),
    "empty": (lambda f: (f / "images").mkdir() or (f / "masks").mkdir() or f, "mask", {}, "there are no pictures in"),
    "target": (paired, "flow", {}, "'flow' is no target"),
    "columns": (paired, "mask", {"columns": {"masks": "x"}}, "columns may say where image"),
    "nowhere": (lambda f: "scene", "mask", {}, "there are no pictures 'scene': give scenes"),
    "scenes": (lambda f: "scenes:val", "mask", {}, "scenes have the splits train, test"),
    "max_images": (paired, "mask", {"max_images": 0}, "max_images is 0"),
    "none of coco": (paired, "boxes", {}, r"has no instances_\*\.json"),
    "split of coco": (lambda f: coco(f).parents[1], "boxes", {"split": "train"}, "instances_val.json, not one for"),
    "no json": (lambda f: save(f / "instances_val.json", "{") or f, "boxes", {}, r"val\.json cannot be read as COCO's"),
    "deep json": (lambda f: save(f / "instances_a.json", "[" * 10**5) or f, "boxes", {}, "cannot be read as COCO's"),
    "no images": (lambda f: coco(f, images=[]), "boxes", {}, "cannot be read as COCO's JSON"),
    "no boxes": (lambda f: coco(f, annotations=[{"image_id": 0}]), "boxes", {}, "it lacks 'bbox'"),
    "no pictures": (lambda f: coco(f), "boxes", {}, r"names 'a\.png', which is not in"),
    "doctype": (lambda f: broken_voc(f, BOMB), "boxes", {}, r"a\.xml cannot be read as Pascal VOC's XML: .*DOCTYPE"),
    "no xml": (lambda f: broken_voc(f, "<a>"), "boxes", {}, r"a\.xml cannot be read as Pascal VOC's XML"),
    "no numbers": (
        lambda f: broken_voc(f, "<a><object><bndbox><xmin>1</xmin></bndbox></object></a>"),
        "boxes",
        {},
        r"a\.xml cannot be read as Pascal VOC's XML",
    ),
    "no list": (
        lambda f: broken_voc(f, None),
        "boxes",
        {"split": "test"},
        "has no list test.txt: .*cat_train, trainval",
    ),
    "a column": (lambda f: rows_of(), "mask", {}, "has no column of the mask that is known, but image"),
    "no column": (lambda f: rows_of(), "mask", {"columns": {"mask": "m"}}, "has no column m, but image"),
    "a missing mask": (lambda f: rows_of(mask=[None] * 3), "mask", {}, "image 0 of data set has no mask"),
    "turned boxes": (lambda f: rows_of(boxes=[[[3, 3, 1, 1]]] * 3), "boxes", {}, "ends before it begins"),
    "three numbers": (lambda f: rows_of(boxes=[[[3, 3, 1]]] * 3), "boxes", {}, "lists of four numbers"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_one_sentence(tmp_path, wrong):
    make, target, options, sentence = WRONG[wrong]
    data = make(tmp_path)
    with pytest.raises(DataError, match=sentence):
        list(open_annotated(data, target, **options).pictures())


def test_files_of_strangers_name_no_others(tmp_path):
    secret = tmp_path / "secret.png"
    save(secret, np.zeros((4, 5, 3), np.uint8))
    for path in ("../secret.png", str(secret)):
        file = coco(tmp_path / "data", "instances_val.json", images=[{"id": 0, "file_name": path}], annotations=[])
        with pytest.raises(DataError, match=r"which is not (in|below) "):
            list(open_annotated(file, "boxes").pictures())
    voc(tmp_path / "voc")
    save(tmp_path / "voc" / "ImageSets" / "Main" / "val.txt", "../../secret\n")
    with pytest.raises(DataError, match="no name of a file"):
        open_annotated(tmp_path / "voc", "boxes", split="val")


def test_labels_outside_of_the_classes():
    def picture(labels):
        return Annotated(index=0, name="a.png", image=Image.new("RGB", (2, 1)), mask=np.array([labels]))

    require_classes(picture([0, 255]), 1)
    require_classes(picture([0, 1]), 1, reduce_zero_label=True)
    for labels, options in (([0, 1], {}), ([0, 2], {"reduce_zero_label": True}), ([255, 0], {"ignore_index": 9})):
        with pytest.raises(DataError, match=r"^the mask of a\.png has the label (1|2|255), but 1 classes"):
            require_classes(picture(labels), 1, **options)
    with pytest.raises(DataError, match=r"a\.png has no mask"):
        require_classes(Annotated(index=0, name="a.png", image=Image.new("RGB", (1, 1))), 2)


def test_paths_may_be_strings(tmp_path):
    source = open_annotated(str(paired(tmp_path)), "mask")
    assert Path(source[0].name).name == "a.png"
