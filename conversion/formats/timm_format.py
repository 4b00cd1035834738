"""timm's own files: any bundle fits, and a config.json beside the weights tells everything that tensors do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from vitreg_hub.arch import ARCHS
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.conversion.formats.rules import drop, same
from vitreg_hub.conversion.formats.vit import HEADS, TOWER, WIDTH_64
from vitreg_hub.network.position_rule import TIMM_RULE

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint
    from vitreg_hub.conversion.formats.base import Outputs


class TimmFormat(CheckpointFormat):
    """timm, whose networks bundles are."""

    keeps_residual_scale: ClassVar[bool] = True

    def is_declared(self, checkpoint: Checkpoint) -> bool:
        """Whether there is timm's config and all names are timm's."""
        names = checkpoint.infos
        return "architecture" in checkpoint.config and self.num_known(names) == len(names)

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """What config.json tells, which may be a bundle's."""
        config = checkpoint.config
        if not config.get("architecture"):
            return bare_facts(self.title, checkpoint)
        from vitreg_hub.bundle.config import Preprocess, read_entry
        from vitreg_hub.conversion.formats.timm_network import facts_of_network

        cfg = config.get("pretrained_cfg") or {}
        ours = read_entry(config["vitreg"]) if config.get("vitreg") else {}
        args = dict(config.get("model_args") or {})
        if "img_size" not in args and "input_size" in cfg:
            args["img_size"] = list(cfg["input_size"][1:])
        preprocess = Preprocess.from_cfg({"input_size": (3, 1, 1), "mean": (), "std": ()} | dict(cfg))
        wanted = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
        labels = config.get("label_names") or cfg.get("label_names")
        return dataclasses.replace(
            facts_of_network(config["architecture"], args),
            preprocess={key: getattr(preprocess, key) for key in wanted if getattr(preprocess, key)},
            positions=ours.get("positions", TIMM_RULE),
            residual_scale=ours.get("residual_scale", 1.0),
            family=ARCHS[ours["arch"]].family if ours else None,
            label_names=tuple(map(str, labels)) if isinstance(labels, list) else None,
        )

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor, other_rows: int) -> Outputs:
        """Run a checkpoint in the network that its config names, if there is one."""
        config = checkpoint.config
        if "architecture" not in config:
            return super().run_reference(checkpoint, bundle, images, other_rows)
        from vitreg_hub.conversion.formats.timm_network import run_timm

        args = {"img_size": bundle.model_args["img_size"]} | dict(config.get("model_args") or {})
        args["num_classes"] = bundle.num_classes
        return run_timm(config["architecture"], args, self.tower_weights(checkpoint), images)

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
