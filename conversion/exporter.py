"""A bundle is written back in the form of a lineage that can hold it."""

import logging
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
from vitreg_hub.files import CARD_FILE, WEIGHTS_FILE, new_folder, require_absent, whole_file
from vitreg_hub.licenses import is_noncommercial, metadata
from vitreg_hub.network.residual_scale import WRITES_TO_STREAM

logger = logging.getLogger(__name__)


class _Export:
    """One bundle in the names of one format; `places` tells for each the bundle's tensor and the rule."""

    def __init__(self, bundle: ModelBundle, fmt: CheckpointFormat) -> None:
        self.bundle, self.fmt = bundle, fmt
        self.places: dict[str, tuple[str, Rule]] = {}
        homeless = []
        for name, tensor in bundle.state_dict.items():
            named = self._named(name)
            self.places |= {exported: (name, rule) for exported, rule in named}
            if not named and name != "head.bias":
                homeless.append(name)
            elif not named and tensor.any():
                homeless.append("head.bias, whose numbers are not 0")
        reasons = list(fmt.obstacles(bundle))
        if not reasons and homeless:
            reasons = [f"it has no place for {', '.join(homeless[:4])}"]
        if reasons:
            raise ConversionError(f"{fmt.name} cannot hold this {bundle.arch}: {', '.join(reasons)}.")

    def _named(self, name: str) -> list[tuple[str, Rule]]:
        """The names under which a tensor is written: that of the first rule that fits, and those of its other parts."""
        prefix = self.fmt.export_prefix(self.bundle)
        inside = [(prefix, rule) for rule in self.fmt.rules]
        outside = [("", rule) for rule in self.fmt.outside]
        fitting = [(before + own, rule) for before, rule in inside + outside if (own := rule.lineage_name(name))]
        if self.bundle.spec.swiglu and any(rule.swiglu for _, rule in fitting):
            fitting = [(exported, rule) for exported, rule in fitting if rule.swiglu]
        parts = fitting[0][1].part[1] if fitting else 0
        return fitting[:parts]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the export."""
        names = {*self.places, self.fmt.mask_token} - {""}
        return {name: tuple(self._tensor(name, "meta").shape) for name in sorted(names)}

    def make(self, exported: str) -> Tensor:
        """A tensor of the export, contiguous."""
        return self._tensor(exported, "cpu").contiguous()

    def _tensor(self, exported: str, device: str) -> Tensor:
        if exported == self.fmt.mask_token:
            return torch.zeros(1, self.bundle.model_args["embed_dim"], device=device)
        name, rule = self.places[exported]
        tensor = self.bundle.state_dict[name].to(device, torch.float32)
        if WRITES_TO_STREAM.fullmatch(name) and not self.fmt.keeps_residual_scale:
            tensor = tensor / self.bundle.residual_scale
        if name == "pos_embed":
            # rows of zeros for the tokens to which their positions are already added
            others = 0 if self.bundle.spec.lineage.distilled else (self.fmt.other_rows or 0)
            tensor = torch.cat([tensor.new_zeros(1, others, tensor.shape[2]), tensor], dim=1)
        k, parts = rule.part
        return rule.reshape.from_timm(tensor.chunk(parts)[k])


def export(bundle: ModelBundle | str | Path, out: str | Path, *, format: str) -> Path:
    """Write a bundle in the form of another lineage, from which `convert` makes a bundle with equal outputs.

    The class token keeps the position that was added to it, so its row of the position table is zero, as are weights
    that a bundle does not have, such as the mask token. License and origin are passed on in a folder's card and in the
    header of a .safetensors file; a .pth file has no place for them.

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
    (_write_folder if fmt.is_folder else _write_file)(exported, out)
    return out


def _write_folder(exported: _Export, out: Path) -> None:
    configs = exported.fmt.config_files(exported.bundle)
    with new_folder(out) as staging:
        write_safetensors(staging / WEIGHTS_FILE, exported.shapes, exported.make)
        for name, content in configs.items():
            (staging / name).write_text(config_text(content), encoding="utf-8")
        (staging / CARD_FILE).write_text(_card(exported.bundle), encoding="utf-8")


def _write_file(exported: _Export, out: Path) -> None:
    origin, license = exported.bundle.provenance.origin, exported.bundle.provenance.license
    if out.suffix == ".safetensors":
        header = {"origin": origin, "license": license} if license else {"origin": origin}
        with whole_file(out) as path:
            write_safetensors(path, exported.shapes, exported.make, metadata=header)
        return
    if license and is_noncommercial(license):
        logger.warning("%s does not tell the license of these weights, which is %s", out, license)
    weights: dict[str, Any] = {name: exported.make(name) for name in exported.shapes}
    content = {exported.fmt.container: weights} if exported.fmt.container else weights
    with whole_file(out) as path:
        torch.save(content, path)


def _card(bundle: ModelBundle) -> str:
    """README.md, which says whose weights these are."""
    data = ModelCardData(library_name="transformers", **metadata(bundle.provenance.license))
    return f"---\n{data.to_yaml()}\n---\n\n{bundle.arch}, exported with vitreg_hub; {bundle.provenance.origin}.\n"
