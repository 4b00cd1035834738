"""Any ViT by name, folder, Hub id or module, with the preprocessing that its weights expect."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub as hf
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from vitreg_hub.arch import require_divisible
from vitreg_hub.bounded import read_json, read_small
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, DataError, VitregError
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.images.pictures import Gray
from vitreg_hub.names import ModelName
from vitreg_hub.network.layout import unwrapped
from vitreg_hub.network.limits import SUFFIXES, AtMost, weights_in
from vitreg_hub.remote.client import hub_errors

OF_BLOCK = re.compile(r"\.\d+\.")
"""In names of tensors. What lies outside of blocks, such as a pooler, is often left out, and not looked at."""
UNKNOWN = "unknown"
"""Preprocessing of a module that does not say what it needs."""

FITTED = {"center": "to cover", "border": "to fit into", "squash": "to"}
"""How timm's crop modes resize before they crop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyVit:
    """A network that was opened, and the preprocessing of its images.

    Attributes:
        name: As it was given, with the tag, or the class of a module; says if the weights are untrained.
        transform: Makes a tensor [C, H, W] of an RGB image; None where it is unknown, or C is neither 3 nor 1.
        preprocessing: The transform in words.
        size: Height and width of the images that the transform makes, where they are known.
        mean: Of the channels, for pixels in [0, 1]; None where it is unknown.
        untrained: Whether the weights are random, since there are none of that name.
    """

    name: str
    model: nn.Module
    transform: Callable[[Image.Image], Tensor] | None
    preprocessing: str
    size: tuple[int, int] | None = None
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    untrained: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorTransform:
    """An image processor of transformers as a transform of one image, called with settings of its own."""

    processor: Any  # each kind has settings of its own
    overrides: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """Make a tensor [3, H, W] of an RGB image."""
        return self.processor(image, return_tensors="pt", **self.overrides).pixel_values[0]


def open_vit(
    model: nn.Module | str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    img_size: int | tuple[int, int] | None = None,
    any_size: bool = False,
    head: bool = False,
) -> AnyVit:
    """Open a ViT.

    Args:
        model: A module of timm or transformers; a folder (a bundle, or a model saved by timm or transformers);
            ``hf-hub:org/name[@revision]`` of the same three kinds; an architecture of ours or of timm, with the tag of
            its weights (``vit_nano_reg4.digits``) or without, for the first that it has. Those of an architecture that
            has none are random and the same every time.
        device: Where a model by name is put, the CPU by default. A module stays where it is.
        dtype: Number type of a model by name, float32 by default.
        img_size: Side, or height and width, of the images in pixels, if not the native one. Positions are resampled;
            models of transformers do so when they are called.
        any_size: Let a model by name take images of other sizes, too, where its network can.
        head: Keep the head of a classifier that transformers saved; those of timm and ours always have theirs.

    Raises:
        UnknownArchError: No such architecture or tag.
        BundleError: The folder or repository holds no model that can be loaded.
        HubError: The Hub refused or cannot be reached.
        DataError: The model cannot take images of this size.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    args: dict[str, Any] = {"img_size": size} if size else {}
    if any_size:
        args["dynamic_img_size"] = True
    untrained = False
    if isinstance(model, nn.Module):
        name, network, processor = type(unwrapped(model)).__name__, model, _processor_of(unwrapped(model))
    else:
        named, processor = ModelName.parse(model), None
        name = named.full
        if named.arch:
            untrained = not named.has_weights()
            network = _named(named, args, untrained=untrained)
        else:
            network, processor = _stored(named, args, head=head)
        network = network.to(device=device, dtype=dtype or torch.float32).eval()
    return AnyVit(
        name=f"{name} (untrained)" if untrained else name,
        model=network,
        untrained=untrained,
        **_preprocessing(unwrapped(network), processor, size),
    )


def _named(name: ModelName, args: dict[str, Any], *, untrained: bool) -> nn.Module:
    if name.is_ours and not untrained:
        return ModelBundle.load(name.full).build(**args)
    with torch.random.fork_rng(devices=[]), hub_errors(name.given):
        torch.default_generator.manual_seed(0)  # timm draws all weights, also those that it replaces
        return _create(name.full, args, pretrained=not untrained)


def _create(name: str, args: dict[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except TypeError as error:
        if "dynamic_img_size" in str(error):
            rest = {key: value for key, value in args.items() if key != "dynamic_img_size"}
            return _create(name, rest, pretrained=pretrained)
        if "img_size" not in str(error):
            raise
        raise DataError(f"{name} takes no other image size than its own: leave img_size out.") from error


def _stored(name: ModelName, args: dict[str, Any], *, head: bool) -> tuple[nn.Module, BaseImageProcessor | None]:
    """Load a folder or a repository: the network and, if it is transformers', its image processor."""
    where, revision = name.repo_id or name.given, name.revision
    with _load_errors(name.given), hub_errors(where):
        if name.repo_id:
            config_file = Path(hf.hf_hub_download(where, CONFIG_FILE, revision=revision))
        else:
            config_file = Path(where, CONFIG_FILE)
        config = read_json(read_small(config_file))
        if "vitreg" in config:
            return ModelBundle.load(name.full).build(**args), None
        if "model_type" not in config and "architecture" in config:
            with AtMost(_stored_bytes(name, config_file.parent), called=name.given):
                return _create(name.given if name.repo_id else f"local-dir:{where}", args, pretrained=True), None
        config = AutoConfig.from_pretrained(where, revision=revision)
        config = getattr(config, "vision_config", config)  # of CLIP and the like, only the image side
        heads = [name for name in config.architectures or () if name.endswith("ForImageClassification")]
        kind = AutoModelForImageClassification if head and heads else AutoModel
        with AtMost(_stored_bytes(name, config_file.parent), called=name.given):
            model, found = kind.from_pretrained(where, revision=revision, config=config, output_loading_info=True)
        if missing := sorted(filter(OF_BLOCK.search, found["missing_keys"])):
            raise BundleError(
                f"the weights of {name.given} lack {len(missing)} tensors of blocks that its {CONFIG_FILE} has, "
                f"first {missing[0]}: get both again."
            )
        return model, _processor(where, revision=revision)


def _stored_bytes(name: ModelName, folder: Path) -> int:
    """Bytes of all weights in a folder, or in a repository of which only a part is in the cache."""
    here = sum(path.stat().st_size for path in weights_in(folder))
    if here or name.repo_id is None:
        return here
    there = hf.HfApi().model_info(name.repo_id, revision=name.revision, files_metadata=True).siblings or ()
    return sum(file.size or 0 for file in there if Path(file.rfilename).suffix in SUFFIXES)


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    """Turn what the libraries raise for a folder without a model of theirs into one sentence."""
    try:
        yield
    except VitregError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{name} holds no model that can be loaded ({reason}): give a bundle, or a folder saved by timm or "
            "transformers."
        ) from error


def _processor_of(model: nn.Module) -> BaseImageProcessor | None:
    """The image processor beside the weights of a module of transformers; None for one built from a configuration."""
    where = model.config.name_or_path if isinstance(model, PreTrainedModel) else ""
    if not where or hasattr(model, "timm_model"):
        return None
    return _processor(where)


def _processor(where: str, *, revision: str | None = None) -> BaseImageProcessor | None:
    """The image processor that is stored beside weights, if there is one."""
    try:
        return AutoImageProcessor.from_pretrained(where, revision=revision)
    except (OSError, ValueError):
        return None


def _preprocessing(
    model: nn.Module, processor: BaseImageProcessor | None, size: tuple[int, int] | None
) -> dict[str, Any]:
    """What `AnyVit` says of the images of a network."""
    network = getattr(model, "timm_model", model)  # inside transformers' wrapper of timm, and ours
    patches = getattr(network, "patch_embed", None)
    native = getattr(patches, "img_size", None)
    if size and native and size != tuple(native) and getattr(patches, "strict_img_size", False):
        raise DataError(
            f"the model takes images of {native[0]}x{native[1]} pixels only, not {size[0]}x{size[1]}: "
            "build it with that img_size, or with dynamic_img_size=True."
        )
    config = getattr(model, "config", None)
    vision_config = getattr(config, "vision_config", config)
    patch_size = getattr(patches or vision_config, "patch_size", None)
    in_chans = getattr(getattr(patches, "proj", None), "in_channels", None) or getattr(vision_config, "num_channels", 3)
    if size and patch_size:
        require_divisible(size, patch_size)
    if cfg := getattr(config, "pretrained_cfg", None) or getattr(network, "pretrained_cfg", None):
        size = size or native
        config = resolve_data_config({"input_size": (3, *size)} if size else {}, pretrained_cfg=cfg)
        transform, words = create_transform(**config), _timm_words(config)
        mean, std, size = config["mean"], config["std"], config["input_size"][1:]
    elif processor is not None:
        transform = ProcessorTransform(processor=processor, overrides=_overrides(processor, size) if size else {})
        settings = vars(processor) | transform.overrides
        made = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
        size = (made["height"], made["width"]) if made and "height" in made else size
        words = _processor_words(settings)
        mean, std = (
            (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else ((0,) * 3, (1,) * 3)
        )
    else:
        return {"transform": None, "preprocessing": UNKNOWN, "in_chans": in_chans}
    if in_chans == 1:
        transform, words = Gray(transform=transform), f"grey, {words}"  # pyright: ignore[reportArgumentType]  # not asked for in parts
    elif in_chans != 3:
        transform = None
    said = {"size": size, "in_chans": in_chans, "mean": tuple(mean), "std": tuple(std)}
    return {"transform": transform, "preprocessing": words, **said}


def _overrides(processor: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Settings for another size of the images, of which the same share is cut off."""
    exact = {"height": size[0], "width": size[1]}
    if not processor.do_center_crop:
        return {"do_resize": True, "size": exact}
    crop, resized = processor.crop_size, dict(processor.size)
    if "shortest_edge" in resized:
        share = resized["shortest_edge"] / min(crop["height"], crop["width"])
        return {"size": {"shortest_edge": round(share * max(size))}, "crop_size": exact}
    return {"size": {side: round(resized[side] / crop[side] * exact[side]) for side in exact}, "crop_size": exact}


def _timm_words(config: dict[str, Any]) -> str:
    height, width = (math.floor(side / config["crop_pct"]) for side in config["input_size"][1:])
    resize = f"{FITTED[config['crop_mode']]} {height}x{width}"
    if config["crop_mode"] == "center" and height == width:
        resize = f"shorter side to {height}"
    return _words(resize, config["interpolation"], config["input_size"][1:], config["mean"], config["std"])


def _processor_words(settings: dict[str, Any]) -> str:
    resize = crop = mean = std = None
    if settings["do_resize"]:
        size = dict(settings["size"])
        edge = size.get("shortest_edge")
        resize = f"shorter side to {edge}" if edge else f"to {size['height']}x{size['width']}"
    if settings["do_center_crop"]:
        crop = (settings["crop_size"]["height"], settings["crop_size"]["width"])
    if settings["do_normalize"]:
        mean, std = settings["image_mean"], settings["image_std"]
    return _words(resize, Image.Resampling(settings["resample"]).name.lower(), crop, mean, std)


def _words(
    resize: str | None,
    interpolation: str,
    crop: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> str:
    steps = []
    if resize:
        steps.append(f"resize {resize} ({interpolation})")
    if crop:
        steps.append(f"crop {crop[0]}x{crop[1]} from the centre")
    if mean and std:
        means, deviations = (", ".join(f"{value:.3g}" for value in values) for values in (mean, std))
        steps.append(f"mean ({means}), std ({deviations})")
    return ", ".join(steps)
