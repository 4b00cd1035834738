"""timm's own files, and the lineages that share its names or nearly: DeiT and DeiT-III."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, ClassVar

from vitreg_hub.arch import ARCHS
from vitreg_hub.conversion.formats.base import LAYER_SCALE, CheckpointFormat, Outputs
from vitreg_hub.conversion.formats.facts import Facts, names_in_order, unknown_keys
from vitreg_hub.conversion.formats.rules import drop, keep, same
from vitreg_hub.files import CONFIG_FILE
from vitreg_hub.network.position_rule import TIMM_RULE, Grid, PositionRule

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

WIDTH_64 = {192: 3, 384: 6, 768: 12, 1024: 16, 1536: 24}
"""Heads of 64 channels, at the widths that Meta and Google released; at width 1280 lineages differ."""

NO_ANTIALIAS = PositionRule(antialias=False)
"""deit/main.py and transformers' ViT, DeiT, CLIP and DINOv2 without registers."""

ATTENTION = same("blocks.{i}.attn.qkv.{x}", "blocks.{i}.attn.proj.{x}")
ATTENTION_AND_MLP = (*ATTENTION, *same("blocks.{i}.norm{n}.{x}", "blocks.{i}.mlp.fc{n}.{x}"))
STEM_AND_NORM = same("cls_token", "pos_embed", "patch_embed.proj.{x}", "norm.{x}")
TOWER = (*STEM_AND_NORM, *ATTENTION_AND_MLP, *same("blocks.{i}.ls{n}.gamma"))
HEADS = same("head.{x}", "dist_token", "head_dist.{x}")


def has_plain_names(names: Container[str], prefix: str = "") -> bool:
    """Whether the names are those that several lineages share."""
    return all(f"{prefix}{name}.weight" in names for name in ("blocks.0.attn.qkv", "patch_embed.proj"))


TOP_KEYS = {"architecture", "num_classes", "num_features", "global_pool", "label_names", "labels", "license"}
TOP_KEYS |= {"model_args", "pretrained_cfg", "vitreg"}
"""What a bundle keeps, or the tensors tell, of a config.json of timm."""
NOT_KEPT = ("test_input_size", "test_crop_pct", "label_descriptions", "label_offset")
"""Fields of timm's `PretrainedCfg` that a bundle has no place for and a user may miss."""


class TimmFormat(CheckpointFormat):
    """timm, whose networks bundles are: a config.json beside the weights tells everything that tensors do not."""

    configs: ClassVar[tuple[str, ...]] = (CONFIG_FILE,)
    keeps_residual_scale: ClassVar[bool] = True

    def is_declared(self, checkpoint: Checkpoint) -> bool:
        names = checkpoint.infos
        return "architecture" in checkpoint.config and self.num_known(names) == len(names)

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """What config.json tells, which may be a bundle's."""
        config = checkpoint.config
        if not config.get("architecture"):
            return dataclasses.replace(bare_facts(self.title, checkpoint), unread=unknown_keys(config, ()))
        from timm.models import PretrainedCfg

        from vitreg_hub.bundle.config import Preprocess, read_entry
        from vitreg_hub.conversion.formats.timm_network import facts_of_network

        top = config if "pretrained_cfg" in config else {key: config[key] for key in config.keys() & TOP_KEYS}
        # older configs have its fields at the top (timm/models/_hub.py, `_parse_model_cfg`)
        cfg = (config if top is not config else config["pretrained_cfg"]) or {}
        ours = read_entry(config["vitreg"]) if config.get("vitreg") else {}
        args = dict(config.get("model_args") or {})
        if "img_size" not in args and "input_size" in cfg:
            args["img_size"] = list(cfg["input_size"][1:])
        preprocess = Preprocess.from_cfg({"input_size": (3, 1, 1), "mean": (), "std": ()} | dict(cfg))
        wanted = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
        given = next((c[key] for c in (top, cfg) for key in ("label_names", "labels") if c.get(key)), None)
        labels = names_in_order(given)
        known = {f.name for f in dataclasses.fields(PretrainedCfg)} | (TOP_KEYS if cfg is config else {"labels"})
        facts = facts_of_network(config["architecture"], args, has_head="head.weight" in checkpoint.infos)
        unread = [*unknown_keys(top, TOP_KEYS), *unknown_keys(cfg, known), *(key for key in NOT_KEPT if cfg.get(key))]
        return dataclasses.replace(
            facts,
            preprocess={key: getattr(preprocess, key) for key in wanted if getattr(preprocess, key)},
            positions=ours.get("positions", TIMM_RULE),
            residual_scale=ours.get("residual_scale", 1.0),
            family=ARCHS[ours["arch"]].family if ours else None,
            label_names=labels,
            unread=(
                *unread,
                *(["label_names, whose numbers are not those of classes"] if given and not labels else ()),
            ),
        )

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor, *, native: Grid) -> Outputs:
        config = checkpoint.config
        if "architecture" not in config:
            return super().run_reference(checkpoint, bundle, images, native=native)
        from vitreg_hub.conversion.formats.timm_network import run_timm

        args = dict(config.get("model_args") or {})
        args |= {"img_size": bundle.model_args["img_size"], "num_classes": bundle.num_classes}
        return run_timm(config["architecture"], args, self.weights_at(checkpoint, bundle, native), images)

    def obstacles(self, bundle: ModelBundle) -> Iterator[str]:
        """None: timm's files hold every bundle."""
        return iter(())


def bare_facts(title: str, checkpoint: Checkpoint) -> Facts:
    """What is assumed about a timm network without a config."""
    assumptions = (usual_images(title),)
    if not any(name.endswith("fc_norm.weight") for name in checkpoint.infos):
        pooling = "the class token is pooled: no tensor tells otherwise, a config beside the weights would"
        assumptions = (pooling, *assumptions)
    return Facts(assumptions=assumptions)


def usual_images(title: str) -> str:
    """That images are normalised as a lineage usually does."""
    return f"mean and std of images are {title}'s usual ones: no tensor tells, a config beside the weights would"


TIMM = TimmFormat(
    name="timm",
    title="timm",
    rules=(
        *TOWER,
        *HEADS,
        *same("reg_token", "norm_pre.{x}", "fc_norm.{x}"),
        *drop("pre_logits.{rest}", why="a layer that timm no longer has"),
    ),
    prefixes=("timm_model.",),
    norm_eps=None,
    act=None,
    marks=(r"reg_token|norm_pre\.weight|fc_norm\.weight", r"blocks\.\d+\.attn\.qkv\.weight"),
    heads=WIDTH_64,
    other_rows=None,
)

DEIT = CheckpointFormat(
    name="deit",
    title="Meta's DeiT",
    rules=(*STEM_AND_NORM, *ATTENTION_AND_MLP, *HEADS),
    marks=(r"dist_token",),
    family="plain",
    heads=WIDTH_64,
    positions=NO_ANTIALIAS,
    crop_pct=0.875,
    container="model",
)

DEIT3 = CheckpointFormat(
    name="deit3",
    title="Meta's DeiT-III",
    rules=(
        *STEM_AND_NORM,
        *ATTENTION_AND_MLP,
        keep("blocks.{i}.gamma_{n}", "blocks.{i}.ls{n}.gamma"),
        keep("head.{x}"),
    ),
    marks=(r"blocks\.\d+\.gamma_1",),
    family="deit3",
    heads={384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16},  # deit/models_v2.py
    other_rows=0,
    positions=NO_ANTIALIAS,
    needs=LAYER_SCALE,
    container="model",
)
