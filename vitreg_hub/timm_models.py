"""Every row of the table as a timm model: entrypoints, pretrained cfgs and tags. Importing it registers them."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    model_entrypoint,
    register_model,
)
from torch import nn

from vitreg_hub.arch import ARCHS, REGISTER_INIT_STD, ArchSpec, require_whole_patches, row
from vitreg_hub.network.kinds import STEM, is_registers, kind_of
from vitreg_hub.tags import DINOV2, SHIPPED_WEIGHTS

CLASSIFIERS = ("deit3", "plain", "deit_distilled")
"""Families that are trained to classify ImageNet-1k."""


def eval_cfg(spec: ArchSpec) -> PretrainedCfg:
    """timm's description of the images that a row expects, without weights."""
    return PretrainedCfg(
        num_classes=1000 if spec.family in CLASSIFIERS else 0,
        input_size=(3, spec.img_size, spec.img_size),
        fixed_input_size=True,
        interpolation="bicubic",
        crop_pct=spec.lineage.crop_pct,
        mean=spec.lineage.mean,
        std=spec.lineage.std,
        first_conv=STEM,
        classifier=kind_of(spec).classifier,  # pyright: ignore[reportArgumentType]  # timm has several as well
    )


def _weights() -> Iterator[tuple[str, PretrainedCfg]]:
    """Yield (architecture.tag, cfg) of all weights: timm's DINOv2 with registers, and the bundles in the package."""
    for ours, timms in DINOV2.items():
        cfg = get_pretrained_cfg(timms)
        yield ours, dataclasses.replace(cfg, hf_hub_id=f"timm/{timms}", url=None)  # pyright: ignore[reportArgumentType]  # there is one
    for folder in sorted(SHIPPED_WEIGHTS.glob("*.*")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config["pretrained_cfg"].items()
        }
        cfg = PretrainedCfg(**fields, label_names=config.get("label_names"))
        yield folder.name, dataclasses.replace(cfg, file=str(folder / "model.safetensors"))


def _default_cfgs() -> dict[str, DefaultCfg]:
    tagged = generate_default_cfgs(dict(_weights()))
    return tagged | generate_default_cfgs({n: eval_cfg(spec) for n, spec in ARCHS.items() if n not in tagged})


default_cfgs = _default_cfgs()  # timm's decorator looks for this name in the module of the entrypoint


def _entrypoint(spec: ArchSpec) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        if pretrained_cfg is None or isinstance(pretrained_cfg, str):  # our tag: upstream's entrypoint has others
            pretrained_cfg = get_pretrained_cfg(f"{spec.name}.{pretrained_cfg}" if pretrained_cfg else spec.name)
        args = spec.model_args() | kwargs
        require_whole_patches(args)
        row(spec.family, spec.size, args[kind_of(spec).registers_argument])  # refuses registers where there can be none
        model = model_entrypoint(spec.base)(pretrained, pretrained_cfg=pretrained_cfg, **args)
        if not pretrained:
            init_registers(model)
        return model

    build.__name__ = build.__qualname__ = spec.name  # the key in timm's registry
    build.__doc__ = f"{spec.family} ViT, {spec.size}, patch {spec.patch_size}, {spec.num_registers} registers."
    return build


def init_registers(model: nn.Module) -> None:
    """Draw the registers of a new model from N(0, `REGISTER_INIT_STD`^2), so that no two are equal."""
    for name, parameter in model.named_parameters():
        if is_registers(name):
            nn.init.normal_(parameter, std=REGISTER_INIT_STD)


def register() -> list[str]:
    """Add every row that timm does not have. Returns the names added; a second call returns []."""
    new = [spec for spec in ARCHS.values() if not is_model(spec.name)]
    for spec in new:
        register_model(_entrypoint(spec))
    return [spec.name for spec in new]


register()
