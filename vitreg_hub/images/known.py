"""Data sets on the Hub that papers score on: where their masks, depths and boxes are, and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Pascal VOC's classes in the order of their numbers in masks; 255 are edges."""

CONVERTED = "refs/convert/parquet"
"""The Hub's own copy of data that were published with a script, which `datasets` no longer runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """A data set on the Hub.

    Attributes:
        repo_id: Its repository.
        columns: Its columns by what they hold, as `dense.USUAL` names it.
        config: Which part of the repository, if it has several.
        revision: Branch, if it is not the main one.
        class_names: Names of the mask's classes.
        reduce_zero_label: The mask's 0 is no class, so that classes count from 1.
    """

    repo_id: str
    columns: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None
    revision: str | None = None
    class_names: tuple[str, ...] | None = None
    reduce_zero_label: bool = False


def _voc(year: int) -> Known:
    """Its boxes are as in the XML files: pixels count from 1."""
    columns = {"image": "image", "boxes": "objects.bboxes"}
    return Known(repo_id="HuggingFaceM4/pascal_voc", config=f"voc{year}_main", revision=CONVERTED, columns=columns)


KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        "imagenet-1k": Known(repo_id="ILSVRC/imagenet-1k", columns={"image": "image", "label": "label"}),
        "ade20k": Known(
            repo_id="merve/scene_parse_150",
            columns={"image": "image", "mask": "annotation"},
            reduce_zero_label=True,
        ),
        "nyuv2": Known(
            repo_id="sayakpaul/nyu_depth_v2", revision=CONVERTED, columns={"image": "image", "depth": "depth_map"}
        ),
        "voc2012-masks": Known(
            repo_id="nateraw/pascal-voc-2012", columns={"image": "image", "mask": "mask"}, class_names=VOC_CLASSES
        ),
        "voc2007": _voc(2007),
        "voc2012": _voc(2012),
        "coco": Known(  # its bbox are corners, unlike COCO's own
            repo_id="detection-datasets/coco", columns={"image": "image", "boxes": "objects.bbox"}
        ),
    }
)
"""By the short names under which they may be asked for, as ``ade20k:validation``."""


def known_data(name: str) -> Known | None:
    """What is known of a short name or of a repository; of those with several parts, of the first."""
    return KNOWN.get(name) or next((known for known in KNOWN.values() if known.repo_id == name), None)
