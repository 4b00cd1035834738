"""DINOv2 as Meta releases and trains it, and DINO v1 (facebookresearch/dinov2, facebookresearch/dino)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from vitreg_hub import typed
from vitreg_hub.conversion.formats.base import LAYER_SCALE, CheckpointFormat
from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.conversion.formats.rules import drop, keep
from vitreg_hub.conversion.formats.timm_format import ATTENTION_AND_MLP, STEM_AND_NORM, TOWER, WIDTH_64
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.position_rule import PositionRule

if TYPE_CHECKING:
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

OFFSET_RULE = PositionRule(antialias=False, offset=0.1)
"""dinov2/hub/backbones.py for models without registers, and dino/vision_transformer.py."""

MASK_TOKEN_WHY = "replaces masked patches in training only"
HEAD_OF_TRAINING = "head of the training objective"
STUDENT = drop("student.{rest}", why="the student; the teacher, its moving average, is the model")

RUN_CONFIG = "config.yaml"
LEVELS = 3
"""How many folders upwards a run's config can be, as for eval/training_124999/teacher_checkpoint.pth."""

RELEASES = "positions follow Meta's releases with registers: the run's config.yaml beside the weights would tell"


class DinoV2Format(CheckpointFormat):
    """DINOv2: releases, and training runs with their config.yaml."""

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """How a run resamples positions (`student.interpolate_antialias` and `student.interpolate_offset`).

        Source: dinov2/configs/ssl_default_config.yaml.
        """
        is_part = {"teacher", "student"} & set(checkpoint.container.split("."))
        if not is_part and not self.prefix_in(checkpoint.infos):
            return Facts()  # a release, not a run
        for folder in [checkpoint.folder, *checkpoint.folder.resolve().parents][:LEVELS]:
            if (folder / RUN_CONFIG).is_file():
                if rule := _rule_in(folder / RUN_CONFIG):
                    return Facts(positions=rule)
                break
        has_registers = any(name.endswith("register_tokens") for name in checkpoint.infos)
        return Facts(assumptions=(RELEASES,) if has_registers else ())


def _rule_in(path: Path) -> PositionRule | None:
    """The rule in a run's config.yaml, None where the file is another program's."""
    try:
        student = yaml.safe_load(path.read_text(encoding="utf-8"))["student"]
        rule = {"antialias": student["interpolate_antialias"], "offset": student["interpolate_offset"]}
        return typed.read(PositionRule, rule, called="positions")
    except (KeyError, TypeError):
        return None
    except (yaml.YAMLError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as the config of a DINOv2 run ({error}).") from error


DINOV2 = DinoV2Format(
    name="dinov2",
    title="Meta's DINOv2",
    rules=(
        *TOWER,
        keep("register_tokens", "reg_token"),
        *drop("mask_token", why=MASK_TOKEN_WHY),
        # dinov2/layers/swiglu_ffn.py: gate and value in one matrix, or each in its own
        keep("blocks.{i}.mlp.w12.{x}", "blocks.{i}.mlp.fc1.{x}", swiglu=True),
        keep("blocks.{i}.mlp.w1.{x}", "blocks.{i}.mlp.fc1.{x}", part=(0, 2), swiglu=True),
        keep("blocks.{i}.mlp.w2.{x}", "blocks.{i}.mlp.fc1.{x}", part=(1, 2), swiglu=True),
        keep("blocks.{i}.mlp.w3.{x}", "blocks.{i}.mlp.fc2.{x}", swiglu=True),
    ),
    prefixes=("teacher.backbone.", "backbone."),
    outside=(
        *STUDENT,
        *drop("teacher.dino_head.{rest}", "teacher.ibot_head.{rest}", why=HEAD_OF_TRAINING),
        *drop("dino_head.{rest}", "ibot_head.{rest}", why=HEAD_OF_TRAINING),
        *drop("dino_loss.{rest}", "ibot_patch_loss.{rest}", why="state of the training objective"),
    ),
    respell=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),  # block_chunks > 0: the second number is already global
    marks=(r"mask_token|register_tokens", r"blocks\.\d+\.(ls1\.gamma|mlp\.w12\.weight)"),
    family="dinov2",
    heads=WIDTH_64,
    positions=OFFSET_RULE,
    registers_positions=PositionRule(antialias=True),
    needs=LAYER_SCALE,
    mask_token="mask_token",
)

DINO = CheckpointFormat(
    name="dino",
    title="Meta's DINO",
    rules=(*STEM_AND_NORM, *ATTENTION_AND_MLP),
    prefixes=("teacher.backbone.", "backbone."),
    outside=(*STUDENT, *drop("teacher.head.{rest}", "head.{rest}", why=HEAD_OF_TRAINING)),
    family="plain",
    heads=WIDTH_64,
    positions=OFFSET_RULE,
    crop_pct=0.875,
)
