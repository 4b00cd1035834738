"""The one form of a bundle on disk: what its config.json holds, and how folders and files are written and read.

A bundle is a folder, which is also a Hub repository: config.json, model.safetensors, README.md.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import timm
from torch import Tensor, nn

from vitreg_hub.arch import ArchSpec, require_whole_patches
from vitreg_hub.bundle.provenance import Provenance, provenance_to_json
from vitreg_hub.errors import BundleError, readable
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.network.positions import TIMM_RULE, PositionRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """The images that the weights expect: names and meaning as in timm's `PretrainedCfg`.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Filter of the resize.
        crop_pct: Share of the resized image that the centre crop keeps.
        crop_mode: timm's name of the crop.
        mean: Channel means, for pixels in [0, 1].
        std: Channel standard deviations.
    """

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Self:
        """Read the fields that this class has from a timm cfg."""
        values = {f.name: cfg[f.name] for f in dataclasses.fields(cls) if f.name in cfg}
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


def make_config(
    *,
    spec: ArchSpec,
    model_args: Mapping[str, Any],
    num_classes: int,
    preprocess: Preprocess,
    provenance: Provenance,
    label_names: tuple[str, ...] | None = None,
    positions: PositionRule = TIMM_RULE,
    residual_scale: float = 1.0,
) -> dict[str, Any]:
    """The content of a bundle's config.json."""
    entry: dict[str, Any] = dict(arch=spec.name, provenance=provenance_to_json(provenance))
    if positions != TIMM_RULE:
        entry["positions"] = dataclasses.asdict(positions)
    if residual_scale != 1:
        entry["residual_scale"] = residual_scale
    cfg = dataclasses.asdict(preprocess) | dict(
        fixed_input_size=True,
        num_classes=num_classes,
        first_conv="patch_embed.proj",
        classifier=["head", "head_dist"] if spec.lineage.distilled else "head",
        license=provenance.license,
    )
    config = dict(
        architecture=spec.base,
        num_classes=num_classes,
        num_features=model_args["embed_dim"],
        global_pool=model_args["global_pool"],
        label_names=list(label_names) if label_names else None,
        model_args=dict(model_args),
        pretrained_cfg={key: value for key, value in cfg.items() if value is not None},
        vitreg=entry,
    )
    return {key: value for key, value in config.items() if value is not None}


def config_text(config: Mapping[str, Any]) -> str:
    """A config.json, with sorted keys, so that equal bundles have equal files."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def read_config(folder: Path, *, called: str) -> dict[str, Any]:
    """Read a bundle's config.json.

    Raises:
        BundleError: There is none, it cannot be read, or it is no JSON object with this package's `vitreg` key.
    """
    with readable(called):
        if not folder.is_dir():
            raise BundleError(
                f"{called} is neither a folder nor an architecture; `vitreg list` prints those, "
                "and a Hub repository needs the prefix 'hf-hub:'."
            )
        if not (folder / CONFIG_FILE).is_file():
            raise BundleError(f"{called} is no bundle: it has no {CONFIG_FILE}.")
        content = (folder / CONFIG_FILE).read_bytes()
    try:
        config = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{called} is no bundle: its {CONFIG_FILE} is not JSON ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("vitreg"), dict):
        raise BundleError(f"{called} is no bundle: its {CONFIG_FILE} has no 'vitreg' entry.")
    return config


def empty_model(config: Mapping[str, Any], **timm_kwargs: Any) -> nn.Module:
    """The network with shapes but no memory; timm checks and completes the arguments.

    Raises:
        DataError: The patch does not divide the image.
    """
    args = {"num_classes": config["num_classes"], **config["model_args"], **timm_kwargs}
    require_whole_patches(args)
    return timm.create_model(
        config["architecture"],
        pretrained_cfg=config["pretrained_cfg"],
        pretrained_model_args=dict(config["model_args"]),
        device="meta",
        **args,
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
