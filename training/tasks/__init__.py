"""Objectives, one folder each; `vitreg_hub.training.tasks.base` says what they have in common."""

from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.supervised.settings import Supervised

TaskSettings = Supervised | DinoV2 | Contrastive | Distill
