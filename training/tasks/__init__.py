"""Objectives, one folder each: `settings.py` does not import torch, `task.py` computes."""

from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.settings import TaskSettings
from vitreg_hub.training.tasks.supervised.settings import Supervised

TASKS: tuple[type[TaskSettings], ...] = (Supervised, DinoV2, Contrastive, Distill)
"""All objectives. A new one gets a folder of its own and is added here."""
