"""What the config.yaml of a DINOv2 training run tells about its checkpoints."""

from pathlib import Path

import yaml

from vitreg_hub import typed
from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.rules import CheckpointFormat
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.positions import PositionRule

RUN_CONFIG = "config.yaml"
LEVELS = 3
"""Folders above a checkpoint in which its run's config can be: eval/training_124999/teacher_checkpoint.pth."""


def is_run(checkpoint: Checkpoint, fmt: CheckpointFormat) -> bool:
    """Whether a checkpoint comes from a training run, not from a release."""
    return fmt.name == "dinov2" and (checkpoint.container == "teacher" or bool(fmt.prefix_in(checkpoint.infos)))


def run_rule(checkpoint: Checkpoint, fmt: CheckpointFormat) -> PositionRule | None:
    """How the run resamples positions; None without its config.yaml.

    Source: dinov2/configs/ssl_default_config.yaml, `student.interpolate_antialias` and `student.interpolate_offset`.

    Raises:
        ConversionError: There is one that cannot be read.
    """
    if not is_run(checkpoint, fmt):
        return None
    folders = [checkpoint.folder, *checkpoint.folder.resolve().parents][:LEVELS]
    path = next((folder / RUN_CONFIG for folder in folders if (folder / RUN_CONFIG).is_file()), None)
    return None if path is None else _rule_in(path)


def _rule_in(path: Path) -> PositionRule | None:
    try:
        student = yaml.safe_load(path.read_text(encoding="utf-8"))["student"]
        told = {"antialias": student["interpolate_antialias"], "offset": student["interpolate_offset"]}
        return typed.read(PositionRule, told, called="positions")
    except (KeyError, TypeError):
        return None  # of another program
    except (yaml.YAMLError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as the config of a DINOv2 run ({error}).") from error
