"""Boxes around objects in the files of COCO and of Pascal VOC. Strangers' files: read with bounded work."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets.folder import IMG_EXTENSIONS

from vitreg_hub.bounded import read_small
from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.images.data_sets import files_below, folders_in
from vitreg_hub.images.paired import PICTURES, aliases, listed

LARGEST_JSON = 2**30
"""Bytes of a JSON file; that of COCO's training images has 450 MB."""


def box_rows(root: Path, split: str | None) -> tuple[list[dict[str, Any]], Path]:
    """Rows ``{"image": ..., "boxes": ...}`` of a COCO JSON file or its folder, or of a folder as Pascal VOC has it.

    Returns:
        Rows, in the order of the JSON file or of the names, and the folder below which they may name files.

    Raises:
        DataError: There is no such file or folder, or it is broken.
    """
    if root.is_dir() and (root / "Annotations").is_dir():
        return _voc_rows(root, split), root
    file = root if root.is_file() else _coco_file(root, split)
    return _coco_rows(file, file.parent.parent if file.parent.name == "annotations" else file.parent)


def _coco_file(root: Path, split: str | None) -> Path:
    """The only JSON file of instances in a folder, or the one of a split."""
    found = [file for folder in (root, root / "annotations") for file in sorted(folder.glob("instances_*.json"))]
    fitting = [
        file for file in found if split is None or file.stem.removeprefix("instances_").startswith(aliases(split))
    ]
    if len(fitting) != 1:
        names = ", ".join(file.name for file in fitting or found)
        wanted = "give the file itself, or its split" if names else "add COCO's JSON, or Pascal VOC's Annotations"
        of = f" for the split {split}" if split else ""
        raise DataError(f"{root} has {names or 'no instances_*.json'}, not one{of}: {wanted}.")
    return fitting[0]


@contextmanager
def _broken(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file} cannot be read as {kind}: {what}.") from error
    except ElementTree.ParseError as error:
        raise DataError(f"{file} cannot be read as {kind}: {error}.") from error


def _coco_rows(file: Path, root: Path) -> tuple[list[dict[str, Any]], Path]:
    """Boxes of all but crowds, as LOST takes them. Images without a box stay."""
    if (size := file.stat().st_size) > LARGEST_JSON:
        raise DataError(f"{file} has {size / 2**20:,.0f} MB, more than the {LARGEST_JSON >> 20} that it may have.")
    with _broken(file, "COCO's JSON"):
        content = json.loads(file.read_bytes())
        images, boxes = content["images"], {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd", 0):
                boxes[annotation["image_id"]].append([float(number) for number in annotation["bbox"]])
        names = [str(image["file_name"]) for image in images]
        if not names:
            raise ValueError("it names no images")
        folder = _with_pictures(root, file, names[0])
    return [
        {"image": {"bytes": None, "path": str(folder / name)}, "bbox": boxes[image["id"]]}
        for name, image in zip(names, images, strict=True)
    ], root


def _with_pictures(root: Path, file: Path, name: str) -> Path:
    """The folder in which the first picture of a COCO file is."""
    split = file.stem.removeprefix("instances_")
    tried = [root / folder for folder in ("", split, *PICTURES, *(f"{parent}/{split}" for parent in PICTURES))]
    found = next((folder for folder in tried if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"{file} names {name!r}, which is not in {root}, its folder {split} or its images: put it there."
        )
    return found


def _voc_rows(root: Path, split: str | None) -> list[dict[str, Any]]:
    if not (root / "JPEGImages").is_dir():
        there = ", ".join(folder.name for folder in folders_in(root))
        raise DataError(f"{root} has {there}, but no JPEGImages: add the folder with the pictures.")
    images = {
        Path(file).stem: file for file in files_below(root / "JPEGImages") if file.lower().endswith(IMG_EXTENSIONS)
    }
    names = listed(root, "Main", split) or sorted(file.stem for file in (root / "Annotations").glob("*.xml"))
    if missing := next((name for name in names if name not in images), None):
        raise DataError(f"there is no picture {missing} in {root / 'JPEGImages'}: add it, or take its annotation away.")
    return [{"image": images[name], "boxes": VocXml(root / "Annotations" / f"{name}.xml")} for name in names]


class VocXml:
    """A file of Pascal VOC, read when its picture is: there are thousands."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def boxes(self) -> list[list[float]]:
        """Left, top, right and bottom edge of every object; VOC counts pixels from 1, and both ends belong to the box.

        Raises:
            DataError: It is missing, too large, or broken, or holds what might make it large.
        """
        try:
            content = read_small(self.file)
        except BundleError as error:
            raise DataError(str(error)) from error
        with _broken(self.file, "Pascal VOC's XML"):
            text = content.decode()  # as text, else the file could choose a coding that hides what is looked for here
            if "<!DOCTYPE" in text:
                raise ValueError("it has a DOCTYPE, by which a small file becomes large: take that away")
            found = []
            for box in ElementTree.fromstring(text).iterfind("object/bndbox"):
                edges = [float(box.findtext(edge) or "") for edge in ("xmin", "ymin", "xmax", "ymax")]
                found.append([edges[0] - 1, edges[1] - 1, *edges[2:]])
        return found
