"""A bundle back in the form of a lineage that can hold it."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from torch import Tensor

from vitreg_hub.bundle.config import config_text
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.checkpoint.safetensors_writer import write_safetensors
from vitreg_hub.conversion.formats.detect import find_format
from vitreg_hub.conversion.formats.rules import CheckpointFormat, Rule
from vitreg_hub.conversion.planning.facts import INTERPOLATIONS
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, require_absent, write_file, write_folder
from vitreg_hub.licenses import is_noncommercial, metadata
from vitreg_hub.network.residual_scale import WRITES_TO_STREAM

logger = logging.getLogger(__name__)

EXPORTS = (
    "dinov2",
    "dino",
    "deit",
    "deit3",
    "timm",
    "openclip",
    "hf-dinov2",
    "hf-dinov2-with-registers",
    "hf-vit",
    "hf-deit",
    "hf-clip",
)
CONTAINERS = {"deit": "model", "deit3": "model"}
"""Keys under which a lineage's .pth files hold the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tensor:
    """Where a tensor of the export comes from: one of the bundle's, in whole or in part, or zeros without any."""

    shape: tuple[int, ...]
    name: str | None = None
    rule: Rule | None = None


class _Export:
    """One bundle in the names of one format."""

    def __init__(self, bundle: ModelBundle, fmt: CheckpointFormat) -> None:
        self.bundle, self.fmt = bundle, fmt
        self.has_head = bundle.num_classes > 0
        self._require_room()
        self.tensors = dict(self._tensors())

    def _require_room(self) -> None:
        bundle, fmt, lineage = self.bundle, self.fmt, self.bundle.spec.lineage
        if fmt.library == "timm":
            return  # it holds every bundle
        other_act = fmt.act not in (None, bundle.activation) and not bundle.spec.swiglu
        reasons = {
            "it has no LayerScale": fmt.family in ("dinov2", "deit3") and "blocks.0.ls1.gamma" not in bundle.state_dict,
            "it has no norm before the first block": fmt.name in ("openclip", "hf-clip") and not lineage.pre_norm,
            "it has no registers": fmt.name == "hf-dinov2-with-registers" and "reg_token" not in bundle.state_dict,
            "it has no distillation token": fmt.name == "hf-deit" and not lineage.distilled,
            "its images are no squares": len(set(bundle.model_args["img_size"])) > 1,
            f"its activation is {bundle.activation}": other_act,
            f"its LayerNorms have epsilon {bundle.norm_eps:g}": fmt.norm_eps not in (None, bundle.norm_eps),
            "its head averages patches": bundle.model_args["global_pool"] != "token",
            "its MLP is SwiGLU": bundle.spec.swiglu and not any(rule.swiglu for rule in fmt.rules),
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise ConversionError(f"{fmt.name} cannot hold this {bundle.arch}: {', '.join(found)}.")

    def _tensors(self) -> Iterator[tuple[str, _Tensor]]:
        homeless = []
        for name, tensor in self.bundle.state_dict.items():
            if name == "head.bias" and not any(rule.source_name(name) for rule in self.fmt.outside + self.fmt.rules):
                if tensor.any():
                    homeless.append("head.bias, whose numbers are not 0")
                continue
            rules = self._rules(name)
            if not rules:
                homeless.append(name)
            for rule, outside in rules:
                prefix = "" if outside else self.prefix
                yield prefix + rule.source_name(name), self._described(name, rule)
        if homeless:
            raise ConversionError(
                f"{self.fmt.name} cannot hold this {self.bundle.arch}: it has no place for {', '.join(homeless[:4])}."
            )
        width = self.bundle.model_args["embed_dim"]
        if self.fmt.name == "dinov2":
            yield "mask_token", _Tensor(shape=(1, width))
        elif self.fmt.name.startswith("hf-dinov2"):
            yield "embeddings.mask_token", _Tensor(shape=(1, width))

    def _rules(self, name: str) -> list[tuple[Rule, bool]]:
        """The rules under whose names a tensor is written: the first that fits, and those of its other parts."""
        both = [
            (rule, outside) for outside, rules in ((False, self.fmt.rules), (True, self.fmt.outside)) for rule in rules
        ]
        fitting = [(rule, outside) for rule, outside in both if rule.source_name(name)]
        if self.bundle.spec.swiglu and any(rule.swiglu for rule, _ in fitting):
            fitting = [(rule, outside) for rule, outside in fitting if rule.swiglu]
        if not fitting:
            return []
        parts = fitting[0][0].part[1]
        return fitting[:parts]

    @property
    def prefix(self) -> str:
        """What the tower's names begin with in this form."""
        is_inside = self.has_head and self.fmt.library == "transformers"  # of a model with a head
        return self.fmt.prefixes[0] if is_inside or self.fmt.name in ("openclip", "hf-clip") else ""

    def _described(self, name: str, rule: Rule) -> _Tensor:
        shape = tuple(self.bundle.state_dict[name].shape)
        if name == "pos_embed":
            shape = (1, shape[1] + self._missing_rows, shape[2])
        shape = (shape[0] // rule.part[1], *shape[1:])
        return _Tensor(
            shape=tuple(rule.reshape.from_timm(torch.empty(shape, device="meta")).shape), name=name, rule=rule
        )

    @property
    def _missing_rows(self) -> int:
        """Rows of zeros before the table: the class token holds its position already."""
        return 0 if self.bundle.spec.lineage.distilled else (self.fmt.other_rows or 0)

    def make(self, name: str) -> Tensor:
        """A tensor of the export, contiguous."""
        described = self.tensors[name]
        if described.name is None:
            return torch.zeros(described.shape)
        tensor = self.bundle.state_dict[described.name].float()
        is_unscaled = self.bundle.residual_scale != 1 and self.fmt.library != "timm"  # whose files keep timm's epsilon
        if is_unscaled and WRITES_TO_STREAM.fullmatch(described.name):
            tensor = tensor / self.bundle.residual_scale
        if described.name == "pos_embed":
            tensor = torch.cat([tensor.new_zeros(1, self._missing_rows, tensor.shape[2]), tensor], dim=1)
        k, number = described.rule.part
        return described.rule.reshape.from_timm(tensor.chunk(number)[k]).contiguous()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the export."""
        return {name: tensor.shape for name, tensor in sorted(self.tensors.items())}


def export(bundle: ModelBundle | str | Path, out: str | Path, *, format: str) -> Path:
    """Write a bundle in the form of another lineage, from which `convert` makes a bundle with equal outputs.

    The class token keeps the position that was folded into it, so its row of the position table is zero; weights that
    a bundle does not have, such as the mask token, are zero. License and origin go on in a folder's card and in a
    .safetensors file's header; a .pth file has no place for them.

    Args:
        bundle: A bundle, or what `ModelBundle.load` takes.
        out: New folder for transformers' formats, new .pth or .safetensors file for the others.
        format: One of `EXPORTS`.

    Returns:
        `out`.

    Raises:
        BundleError: `out` exists or cannot be written, or there is no bundle.
        ConversionError: The format cannot hold the model.
    """
    if format not in EXPORTS:
        raise ConversionError(f"no export to {format!r}; there are {', '.join(EXPORTS)}.")
    fmt, out = find_format(format), Path(out)
    require_absent(out)
    is_folder = fmt.library == "transformers"
    if not is_folder and out.suffix not in (".pth", ".safetensors"):
        raise ConversionError(
            f"{format} is one file: give it a name that ends in .pth or .safetensors, not {out.name!r}."
        )
    if is_folder and out.suffix in (".pth", ".safetensors", ".bin"):
        raise ConversionError(f"{format} is a folder: give it a name without {out.suffix}.")
    bundle = bundle if isinstance(bundle, ModelBundle) else ModelBundle.load(bundle)
    exported = _Export(bundle, fmt)
    rule = (fmt.registers_positions if "reg_token" in bundle.state_dict else None) or fmt.positions
    if rule != bundle.positions:
        logger.warning("%s resamples positions differently: outputs are equal at the native image size only", fmt.title)

    if is_folder:
        settings = {
            CONFIG_FILE: _transformers_config(exported),
            "preprocessor_config.json": _transformers_images(bundle, fmt),
        }

        def fill(staging: Path) -> None:
            write_safetensors(staging / WEIGHTS_FILE, exported.shapes, exported.make)
            for name, content in settings.items():
                (staging / name).write_text(config_text(content), encoding="utf-8")
            (staging / CARD_FILE).write_text(_card(bundle), encoding="utf-8")

        return write_folder(out, fill)
    if out.suffix == ".safetensors":
        origin = bundle.provenance
        told = {"origin": origin.origin} | ({"license": origin.license} if origin.license else {})
        return write_file(out, lambda path: write_safetensors(path, exported.shapes, exported.make, metadata=told))
    if bundle.provenance.license and is_noncommercial(bundle.provenance.license):
        logger.warning("%s does not tell the license of these weights, which is %s", out, bundle.provenance.license)
    weights: dict[str, Any] = {name: exported.make(name) for name in exported.shapes}
    content = {CONTAINERS[format]: weights} if format in CONTAINERS else weights
    return write_file(out, lambda path: torch.save(content, path))


def _card(bundle: ModelBundle) -> str:
    """README.md, which tells whose weights these are."""
    data = ModelCardData(library_name="transformers", **metadata(bundle.provenance.license))
    return f"---\n{data.to_yaml()}\n---\n\n{bundle.arch}, exported with vitreg_hub; {bundle.provenance.origin}.\n"


def _transformers_config(exported: _Export) -> Mapping[str, Any]:
    """config.json, made by transformers' own class."""
    bundle, name = exported.bundle, exported.fmt.name
    args, width = bundle.model_args, bundle.model_args["embed_dim"]
    hidden = bundle.state_dict["blocks.0.mlp.fc1.weight"].shape[0]
    common = dict(
        hidden_size=width,
        num_hidden_layers=args["depth"],
        num_attention_heads=args["num_heads"],
        image_size=args["img_size"][0],
        patch_size=args["patch_size"],
        num_channels=args["in_chans"],
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(bundle.activation, bundle.activation),
        # a scale tells 1e-12 as 0.954e-12
        layer_norm_eps=1e-12 if bundle.residual_scale == 1024 else bundle.norm_eps,
    )
    if name.startswith("hf-dinov2"):
        if bundle.spec.swiglu and (int(width * 4 * 2 / 3) + 7) // 8 * 8 != hidden // 2:
            raise ConversionError(f"{exported.fmt.title} has no SwiGLU of width {hidden // 2} for {width} channels.")
        if not bundle.spec.swiglu and hidden % width:
            raise ConversionError(f"{exported.fmt.title} has no MLP of width {hidden} for {width} channels.")
        common |= dict(mlp_ratio=4 if bundle.spec.swiglu else hidden // width, use_swiglu_ffn=bundle.spec.swiglu)
        common |= {"hidden_act": "gelu"} if bundle.spec.swiglu else {}
        if name == "hf-dinov2":
            kind, config = "Dinov2Model", transformers.Dinov2Config(**common)
        else:
            registers = bundle.state_dict["reg_token"].shape[1]
            kind = "Dinov2WithRegistersModel"
            config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **common)
    elif name == "hf-clip":
        kind = "CLIPVisionModelWithProjection" if exported.has_head else "CLIPVisionModel"
        projection = {"projection_dim": bundle.num_classes} if exported.has_head else {}
        config = transformers.CLIPVisionConfig(intermediate_size=hidden, **projection, **common)
    else:
        vit = name == "hf-vit"
        names = (
            ("ViTModel", "ViTForImageClassification") if vit else ("DeiTModel", "DeiTForImageClassificationWithTeacher")
        )
        kind = names[exported.has_head]
        labels = {} if not exported.has_head else {"num_labels": bundle.num_classes}
        if bundle.label_names:
            labels = {"id2label": dict(enumerate(bundle.label_names))}
        config = (transformers.ViTConfig if vit else transformers.DeiTConfig)(
            intermediate_size=hidden, **labels, **common
        )
    return config.to_dict() | {"architectures": [kind]}


def _transformers_images(bundle: ModelBundle, fmt: CheckpointFormat) -> dict[str, Any]:
    """preprocessor_config.json, for whichever processor of transformers resizes and crops as the bundle says."""
    images, side = bundle.preprocess, bundle.preprocess.input_size[1]
    resized = round(side / images.crop_pct)
    is_squashed = images.crop_mode == "squash"
    kind = "CLIPImageProcessor" if fmt.name == "hf-clip" else "BitImageProcessor"
    return dict(
        image_processor_type="DeiTImageProcessor" if is_squashed else kind,
        size={"height": resized, "width": resized} if is_squashed else {"shortest_edge": resized},
        do_center_crop=resized != side or not is_squashed,
        crop_size={"height": side, "width": side},
        do_resize=True,
        resample={name: number for number, name in INTERPOLATIONS.items()}.get(images.interpolation, 3),
        do_rescale=True,
        do_normalize=True,
        image_mean=list(images.mean),
        image_std=list(images.std),
    )
