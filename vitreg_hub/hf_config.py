"""The configuration of our models in transformers: a bundle's config.json in memory."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

from timm.layers import to_2tuple
from timm.models import PretrainedCfg, get_pretrained_cfg
from transformers import TimmWrapperConfig
from transformers.backbone_utils import BackboneConfigMixin

from vitreg_hub.arch import ArchSpec, get_arch, row
from vitreg_hub.bounded import excesses
from vitreg_hub.bundle.config import BundleConfig, Preprocess, config_from_json, read_entry
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.bundle.rules import source_problems
from vitreg_hub.errors import BundleError
from vitreg_hub.network.kinds import kind_of


def _model_arg(name: str) -> property:
    """A configuration attribute that lives in `model_args` under timm's name."""

    def write(config: "VitRegConfig", value: Any) -> None:
        config.model_args[name] = value
        config.pretrained_cfg["input_size"] = [config.num_channels, *config.model_args["img_size"]]

    return property(lambda config: config.model_args[name], write)


class VitRegConfig(BackboneConfigMixin, TimmWrapperConfig):
    """Configuration of a register ViT: a bundle's config.json in memory.

    Args:
        arch: Name of a row of the table (``vitreg list``).
        model_args: Arguments of the upstream timm entrypoint; completed from the row.
        apply_layernorm: Whether a backbone's feature maps pass the final norm.
        reshape_hidden_states: Whether a backbone's feature maps are [B, D, H, W] instead of [B, N, D].
        out_features: Names of a backbone's stages (``stem``, ``stage1`` ...); `out_indices` gives them by number.

    The usual names (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `mlp_ratio`, `patch_size`, `image_size`,
    `num_channels`, `num_register_tokens`) can be read, set, and given as arguments.
    """

    vitreg: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_args: Any = dataclasses.field(default_factory=dict)  # transformers' type allows None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    hidden_size = _model_arg("embed_dim")
    num_hidden_layers = _model_arg("depth")
    num_attention_heads = _model_arg("num_heads")
    mlp_ratio = _model_arg("mlp_ratio")
    patch_size = _model_arg("patch_size")
    num_channels = _model_arg("in_chans")
    _img_size = _model_arg("img_size")

    def __new__(cls, *args: Any, **kwargs: Any) -> "VitRegConfig | TimmWrapperConfig":
        """`AutoConfig.for_model("timm_wrapper", architecture=...)` means any timm model, not one of ours."""
        if "architecture" in kwargs and not kwargs.get("vitreg"):
            return TimmWrapperConfig(*args, **kwargs)
        return super().__new__(cls)

    def __post_init__(self, arch: str = "vit_base_reg4", **kwargs: Any) -> None:
        spec = get_arch(self.vitreg["arch"] if self.vitreg else arch)
        cfg = dataclasses.asdict(cast(PretrainedCfg, get_pretrained_cfg(spec.name)))
        args = spec.model_args() | (self.model_args or {})
        args["img_size"] = to_2tuple(args["img_size"])
        defaults = BundleConfig(
            arch=spec.name,
            model_args=args,
            num_classes=0,
            preprocess=Preprocess.from_cfg(cfg | {"input_size": [args["in_chans"], *args["img_size"]]}),
            provenance=Provenance(origin="random initialisation"),
        )
        defaults = json.loads(defaults.text())  # lists in place of tuples, as when read from disk
        self.architecture, self.model_args = spec.base, defaults["model_args"]
        self.vitreg = copy.deepcopy(self.vitreg) or defaults["vitreg"]
        self.pretrained_cfg = copy.deepcopy(self.pretrained_cfg) or defaults["pretrained_cfg"]
        self.pretrained_cfg.pop("num_classes", None)
        for said_elsewhere in ("num_classes", "num_features", "global_pool", "label_names"):
            kwargs.pop(said_elsewhere, None)
        # names of stages depend on the depth, so the network's shape is set first
        for name in list(kwargs):
            if isinstance(vars(VitRegConfig).get(name), property):
                setattr(self, name, kwargs.pop(name))
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> ArchSpec:
        """The row of the table."""
        return get_arch(self.vitreg["arch"])

    @property
    def residual_scale(self) -> float:
        """How many times larger the residual stream of the stored network is."""
        return float(self.vitreg.get("residual_scale", 1))

    @property
    def stage_names(self) -> list[str]:
        """Names of the residual stream before the first block and after each."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def image_size(self) -> int | list[int]:
        """Native side in pixels, or height and width where they differ."""
        height, width = self.model_args["img_size"]
        return height if height == width else [height, width]

    @image_size.setter
    def image_size(self, size: int | list[int]) -> None:
        self._img_size = list(to_2tuple(size))

    @property
    def num_register_tokens(self) -> int:
        """Number of registers; setting it moves to the row of the same size for so many."""
        return self.model_args[kind_of(self.spec).registers_argument]

    @num_register_tokens.setter
    def num_register_tokens(self, number: int) -> None:
        self.vitreg["arch"] = row(self.spec.family, self.spec.size, number).name
        self.model_args[kind_of(self.spec).registers_argument] = number

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VitRegConfig | TimmWrapperConfig":
        """Read a config.json: ours, or any other timm repository's as if this package were not there."""
        if not config_dict.get("vitreg"):
            return TimmWrapperConfig.from_dict(config_dict, **kwargs)
        problems = [*source_problems(config_dict), *islice(excesses(config_dict), 1)]
        try:
            _ = problems or config_from_json(config_dict)
        except BundleError as error:
            problems.append(str(error))
        if problems:
            raise BundleError("config.json breaks the form of a bundle: " + "; ".join(problems))
        config = {"num_labels": config_dict.get("num_classes")} | config_dict
        if names := config.get("label_names"):
            config = {"id2label": dict(enumerate(names)), "label2id": _inverse(names)} | config
        # not TimmWrapperConfig's, which prefers its own reading of names to what a user says
        return super(TimmWrapperConfig, cls).from_dict(config, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes to disk: a bundle's config.json, and settings of transformers that differ from its defaults."""
        settings = super().to_diff_dict()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        not_stored = ("model_type", "architectures", "dtype", "transformers_version", "num_labels", "label_names")
        settings = {k: v for k, v in settings.items() if k not in not_stored and v != defaults.get(k, not_stored)}
        if settings.get("out_indices") == [self.num_hidden_layers]:
            del settings["out_indices"], settings["out_features"]
        names = {int(i): name for i, name in (self.id2label or {}).items()}
        labels = tuple(names[i] for i in sorted(names))
        config = BundleConfig(
            model_args=self.model_args,
            num_classes=len(labels),
            preprocess=Preprocess.from_cfg(self.pretrained_cfg),
            label_names=None if labels == default_names(len(labels)) else labels,
            **read_entry(self.vitreg),
        )
        # transformers leaves out what is so by default, two classes without names, and then makes both maps anew
        label2id, default = self.label2id, default_names(2)
        if labels == default:
            label2id = _inverse(default)
        elif label2id == _inverse(default):
            label2id = None
        if (names, label2id) != (dict(enumerate(labels)), _inverse(labels)):  # more than names in order
            settings |= {"id2label": names, "label2id": label2id}
        return settings | config.to_json()


def default_names(number: int) -> tuple[str, ...]:
    """transformers' names of classes that have none."""
    return tuple(f"LABEL_{i}" for i in range(number))


def _inverse(names: Sequence[str]) -> dict[str, int] | None:
    """The class of each name, where no two are equal."""
    return {name: i for i, name in enumerate(names)} if len(set(names)) == len(names) else None
