"""The one form of a bundle on disk: what its config.json holds, and how folders and files are written and read.

A bundle is a folder, which is also a Hub repository: config.json, model.safetensors, README.md.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from vitreg_hub.arch import ArchSpec, require_whole_patches
from vitreg_hub.errors import BundleError, readable
from vitreg_hub.hub_access import CONFIG_FILE
from vitreg_hub.positions import TIMM_RULE, PositionRule

CONVERSION_KEY, ARTIFACTS_KEY, DOORS_KEY, BEST_KEY = "conversion", "artifacts", "doors", "best"
"""Keys of `Provenance.settings`: two reports, what `doors.verify` found, and by what a run's best model was chosen."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where weights came from.

    Attributes:
        origin: One sentence.
        license: SPDX identifier, in the Hub's lower-case spelling.
        dataset: What they were trained or measured on.
        metrics: Measured figures by name, shares in [0, 1].
        settings: What a second run would need.
        versions: Versions of the libraries that were used.
        command: Command line that made them, without the machine's folders.
        commit: Commit of this package's source that did.
        created: When, in UTC (ISO 8601).
        hardware: What computed.
        seconds: Wall time that it took.
    """

    origin: str
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    created: str | None = None
    hardware: str | None = None
    seconds: float | None = None


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
    entry: dict[str, Any] = dict(arch=spec.name, provenance=dataclasses.asdict(provenance))
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


def require_absent(target: Path) -> None:
    """Refuse to replace a folder.

    Raises:
        BundleError: There is something, or the system does not tell.
    """
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror}.") from error
    raise BundleError(f"{target} exists: choose another folder or delete it first.")


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Run `fill` in a sibling temporary folder and rename it into place.

    Raises:
        BundleError: `target` exists, or cannot be written; nothing is left of it.
    """
    require_absent(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {target.parent}: {error.strerror}.") from error
    try:
        fill(staging)
        mask = _umask()
        for path in (staging, *staging.rglob("*")):  # mkdtemp and safetensors make private ones
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        staging.rename(target)
    except BaseException as error:
        shutil.rmtree(staging)
        for folder in made:
            folder.rmdir()
        if isinstance(error, OSError | SafetensorError):  # a full disk ends in either
            raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error
        raise
    return target


def write_file(target: Path, write: Callable[[Path], None], *, replace: bool = False) -> Path:
    """Run `write` on a file in a temporary folder beside the target and rename it into place.

    Args:
        target: The file; must not exist unless `replace`.
        write: Takes the path to write to.
        replace: Put it in the place of an old one.

    Raises:
        BundleError: `target` exists, or cannot be written; it is as it was before.
    """
    if not replace:
        require_absent(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            write(Path(staging, target.name))
            Path(staging, target.name).replace(target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error
    return target


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
