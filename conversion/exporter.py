"""A bundle back in the form of a lineage that can hold it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from vitreg_hub.bundle.config import config_text
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.checkpoint.safetensors_writer import write_safetensors
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.detect import EXPORTS, find_format
from vitreg_hub.conversion.formats.rules import Rule
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CARD_FILE, WEIGHTS_FILE, require_absent, write_file, write_folder
from vitreg_hub.licenses import is_noncommercial, metadata
from vitreg_hub.network.residual_scale import WRITES_TO_STREAM

logger = logging.getLogger(__name__)


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
        if obstacles := list(fmt.obstacles(bundle)):
            self._refuse(", ".join(obstacles))
        self.tensors = dict(self._tensors())

    def _refuse(self, why: str) -> None:
        raise ConversionError(f"{self.fmt.name} cannot hold this {self.bundle.arch}: {why}.")

    def _tensors(self) -> Iterator[tuple[str, _Tensor]]:
        homeless = []
        for name, tensor in self.bundle.state_dict.items():
            named = self._named(name)
            if not named and name != "head.bias":
                homeless.append(name)
            elif not named and tensor.any():
                homeless.append("head.bias, whose numbers are not 0")
            for exported, rule in named:
                yield exported, self._described(name, rule)
        if homeless:
            self._refuse(f"it has no place for {', '.join(homeless[:4])}")
        if self.fmt.mask_token:
            yield self.fmt.mask_token, _Tensor(shape=(1, self.bundle.model_args["embed_dim"]))

    def _named(self, name: str) -> list[tuple[str, Rule]]:
        """The names under which a tensor is written: by the first rule that fits, and by those of its other parts."""
        prefix = self.fmt.export_prefix(self.bundle)
        inside = [(prefix, rule) for rule in self.fmt.rules]
        outside = [("", rule) for rule in self.fmt.outside]
        fitting = [(before, rule) for before, rule in inside + outside if rule.lineage_name(name)]
        if self.bundle.spec.swiglu and any(rule.swiglu for _, rule in fitting):
            fitting = [(before, rule) for before, rule in fitting if rule.swiglu]
        parts = fitting[0][1].part[1] if fitting else 0
        return [(before + rule.lineage_name(name), rule) for before, rule in fitting[:parts]]

    def _described(self, name: str, rule: Rule) -> _Tensor:
        shape = tuple(self.bundle.state_dict[name].shape)
        if name == "pos_embed":
            shape = (1, shape[1] + self._missing_rows, shape[2])
        shape = (shape[0] // rule.part[1], *shape[1:])
        reshaped = rule.reshape.from_timm(torch.empty(shape, device="meta"))
        return _Tensor(shape=tuple(reshaped.shape), name=name, rule=rule)

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
        is_unscaled = self.bundle.residual_scale != 1 and not self.fmt.keeps_residual_scale
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
    if not fmt.is_folder and out.suffix not in (".pth", ".safetensors"):
        raise ConversionError(
            f"{format} is one file: give it a name that ends in .pth or .safetensors, not {out.name!r}."
        )
    if fmt.is_folder and out.suffix in (".pth", ".safetensors", ".bin"):
        raise ConversionError(f"{format} is a folder: give it a name without {out.suffix}.")
    bundle = bundle if isinstance(bundle, ModelBundle) else ModelBundle.load(bundle)
    exported = _Export(bundle, fmt)
    if fmt.position_rule(has_registers="reg_token" in bundle.state_dict) != bundle.positions:
        logger.warning("%s resamples positions differently: outputs are equal at the native image size only", fmt.title)
    return _write_folder(exported, out) if fmt.is_folder else _write_file(exported, out)


def _write_folder(exported: _Export, out: Path) -> Path:
    configs = exported.fmt.config_files(exported.bundle)

    def fill(staging: Path) -> None:
        write_safetensors(staging / WEIGHTS_FILE, exported.shapes, exported.make)
        for name, content in configs.items():
            (staging / name).write_text(config_text(content), encoding="utf-8")
        (staging / CARD_FILE).write_text(_card(exported.bundle), encoding="utf-8")

    return write_folder(out, fill)


def _write_file(exported: _Export, out: Path) -> Path:
    origin, license = exported.bundle.provenance.origin, exported.bundle.provenance.license
    if out.suffix == ".safetensors":
        header = {"origin": origin} | ({"license": license} if license else {})
        return write_file(out, lambda path: write_safetensors(path, exported.shapes, exported.make, metadata=header))
    if license and is_noncommercial(license):
        logger.warning("%s does not tell the license of these weights, which is %s", out, license)
    weights: dict[str, Any] = {name: exported.make(name) for name in exported.shapes}
    content = {exported.fmt.container: weights} if exported.fmt.container else weights
    return write_file(out, lambda path: torch.save(content, path))


def _card(bundle: ModelBundle) -> str:
    """README.md, which tells whose weights these are."""
    data = ModelCardData(library_name="transformers", **metadata(bundle.provenance.license))
    return f"---\n{data.to_yaml()}\n---\n\n{bundle.arch}, exported with vitreg_hub; {bundle.provenance.origin}.\n"
