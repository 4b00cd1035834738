"""The content of a bundle's config.json, typed: one reader, one writer, and what follows from it.

A bundle is a folder, which is also a Hub repository: config.json, model.safetensors, README.md.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import timm
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub import typed
from vitreg_hub.arch import ARCHS, ArchSpec, get_arch, require_whole_patches
from vitreg_hub.bounded import read_json, read_small
from vitreg_hub.bundle.provenance import Provenance, provenance_from_json, provenance_to_json
from vitreg_hub.errors import BundleError, readable
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.network.kinds import STEM, NetworkKind, kind_of
from vitreg_hub.network.positions import TIMM_RULE, PositionRule
from vitreg_hub.network.residual_scale import ResidualScale, unscaled_epsilon
from vitreg_hub.network.untold import UNTOLD, Untold

ARGUMENTS: dict[str, Any] = {
    "img_size": tuple[PositiveInt, PositiveInt],
    "patch_size": PositiveInt,
    "in_chans": PositiveInt,
    "embed_dim": PositiveInt,
    "depth": PositiveInt,
    "num_heads": PositiveInt,
    "weight_init": Literal["skip", "reset", "jax", "jax_nlhb", "moco", ""],
}
"""Types of the arguments in `model_args` that this package reads; timm checks the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """The images that the weights expect: names and meaning as in timm's `PretrainedCfg`.

    Attributes:
        input_size: Channels, height and width.
        crop_pct: Share of the resized image that the centre crop keeps.
        mean: Channel means, for pixels in [0, 1].
    """

    input_size: tuple[int, int, int]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    crop_mode: Literal["center", "border", "squash", "random"] = "center"
    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Self:
        """Read the fields that this class has from a timm cfg.

        Raises:
            BundleError: One is missing, or of another type.
        """
        known = {f.name: cfg[f.name] for f in dataclasses.fields(cls) if cfg.get(f.name) is not None}
        return typed.read(cls, known, called="pretrained_cfg", error=BundleError)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleConfig:
    """The content of a bundle's config.json.

    Attributes:
        arch: Name of a row of the table.
        model_args: Complete arguments of the row's upstream entrypoint, without the number of classes.
        num_classes: Width of the classification head, 0 without one.
        residual_scale: How many times larger the residual stream of the stored network is (`residual_scale.py`).
    """

    arch: str
    model_args: Mapping[str, Any]
    num_classes: int
    preprocess: Preprocess
    provenance: Provenance
    label_names: tuple[str, ...] | None = None
    positions: PositionRule = TIMM_RULE
    residual_scale: float = 1.0

    @property
    def spec(self) -> ArchSpec:
        """The row of the table."""
        return get_arch(self.arch)

    @property
    def kind(self) -> NetworkKind:
        """The timm class that the row builds on."""
        return kind_of(self.spec)

    @property
    def num_registers(self) -> int:
        """Register tokens, which may be more than the row's."""
        return self.model_args[self.kind.registers_argument]

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return self.model_args["embed_dim"]

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        height, width = self.model_args["img_size"]
        return height, width

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model_args["patch_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of an image in patches."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def norm_eps(self) -> float:
        """LayerNorm's epsilon, in a network whose residual stream is not scaled."""
        return unscaled_epsilon(self.spec.lineage.norm_eps, self.residual_scale)

    @property
    def activation(self) -> str:
        """timm's name of the MLP's activation."""
        return "silu" if self.spec.swiglu else self.model_args.get("act_layer", self.spec.lineage.act)

    @property
    def untold(self) -> tuple[tuple[Untold, Any], ...]:
        """The facts that plain timm is not told, with their values, in the order in which they are applied."""
        return tuple((part, getattr(self, part.key)) for part in UNTOLD)

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        entry: dict[str, Any] = dict(arch=self.arch, provenance=provenance_to_json(self.provenance))
        entry |= {part.key: part.to_json(value) for part, value in self.untold if value != part.default}
        cfg = dataclasses.asdict(self.preprocess) | dict(
            fixed_input_size=True,
            num_classes=self.num_classes,
            first_conv=STEM,
            classifier=self.kind.classifier,
            license=self.provenance.license,
        )
        config = dict(
            architecture=self.spec.base,
            num_classes=self.num_classes,
            num_features=self.embed_dim,
            global_pool=self.model_args["global_pool"],
            label_names=list(self.label_names) if self.label_names else None,
            model_args=dict(self.model_args),
            pretrained_cfg={key: value for key, value in cfg.items() if value is not None},
            vitreg=entry,
        )
        return {key: value for key, value in config.items() if value is not None}

    def text(self) -> str:
        """The text of config.json."""
        return config_text(self.to_json())


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The fields of a `BundleConfig` that timm has no place for: they stand under `vitreg`."""

    arch: Any
    provenance: Any
    positions: PositionRule = TIMM_RULE
    residual_scale: ResidualScale = 1.0


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The keys of a config.json that are read; all others follow from them."""

    model_args: Mapping[str, Any]
    num_classes: int
    pretrained_cfg: Mapping[str, Any]
    label_names: tuple[str, ...] | None = None
    vitreg: _Entry


def read_entry(entry: Any) -> dict[str, Any]:
    """Read the entry `vitreg` of a config.json: fields of `BundleConfig`.

    Raises:
        BundleError: The entry does not fit; the message names every wrong key and what is wrong with it.
    """
    return _fields(typed.read(_Entry, entry, called="vitreg", error=BundleError))


def _fields(entry: _Entry) -> dict[str, Any]:
    if not isinstance(entry.arch, str) or entry.arch not in ARCHS:
        raise BundleError(f"no architecture {entry.arch!r}; a newer vitreg_hub may have it")
    return vars(entry) | {"provenance": provenance_from_json(entry.provenance)}


def config_from_json(config: Mapping[str, Any]) -> BundleConfig:
    """Read the content of a config.json; `rules.py` checks the rules.

    Raises:
        BundleError: Something is missing or of another type; the message names every key and what is wrong with it.
    """
    known = {f.name: config[f.name] for f in dataclasses.fields(_Form) if f.name in config}
    form = typed.read(_Form, known, error=BundleError)
    entry = _fields(form.vitreg)
    registers: dict[str, Any] = {kind_of(get_arch(form.vitreg.arch)).registers_argument: NonNegativeInt}
    for name, wanted in (ARGUMENTS | registers).items():
        if name in form.model_args:
            typed.read(wanted, form.model_args[name], called=f"model_args.{name}", error=BundleError)
    return BundleConfig(
        model_args=form.model_args,
        num_classes=form.num_classes,
        preprocess=Preprocess.from_cfg(form.pretrained_cfg),
        label_names=form.label_names or None,
        **entry,
    )


def config_text(config: Mapping[str, Any]) -> str:
    """The text of a config.json, with sorted keys, so that equal bundles have equal files."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def read_config(folder: Path, *, called: str) -> dict[str, Any]:
    """Read a bundle's config.json, as it is written.

    Raises:
        BundleError: There is none, it cannot be read, or it is not a JSON object with this package's `vitreg` key.
    """
    with readable(called):
        if not folder.is_dir():
            raise BundleError(f"{called} is not a folder, so not a bundle.")
        if not (folder / CONFIG_FILE).is_file():
            inside = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}"))
            hint = f", but there is {', '.join(inside[:3])}" if inside else ""
            raise BundleError(f"{called} is not a bundle: it has no {CONFIG_FILE}{hint}.")
        content = read_small(folder / CONFIG_FILE)
    try:
        config = read_json(content)
    except ValueError as error:
        raise BundleError(f"{called} is not a bundle: its {CONFIG_FILE} cannot be read ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("vitreg"), dict):
        raise BundleError(f"{called} is not a bundle: its {CONFIG_FILE} has no 'vitreg' entry.")
    return config


def empty_model(config: BundleConfig, **timm_kwargs: Any) -> VisionTransformer:
    """The network with shapes but no memory; timm checks and completes the arguments.

    Raises:
        DataError: The patch does not divide the image.
    """
    args = {"num_classes": config.num_classes, **config.model_args, **timm_kwargs}
    require_whole_patches(args)
    named = {"label_names": config.label_names} if args["num_classes"] == config.num_classes else {}
    network = timm.create_model(
        config.spec.base,
        pretrained_cfg=config.to_json()["pretrained_cfg"] | named,
        pretrained_model_args=dict(config.model_args),
        device="meta",
        **args,
    )
    return cast(VisionTransformer, network)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
