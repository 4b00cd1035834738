"""Protocols on models: what the data allow, each image once for all protocols that read the same of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from vitreg_hub.environment import versions
from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.features import Features
from vitreg_hub.evaluation.interventions import INTERVENTIONS, Intervention
from vitreg_hub.evaluation.labels import class_names, match
from vitreg_hub.evaluation.linear import LinearSettings
from vitreg_hub.evaluation.opened import Opened, Options, class_list, data_facts, open_split, same_classes
from vitreg_hub.evaluation.probing import Learned, class_score_rows, knn, linear, logreg
from vitreg_hub.evaluation.results import PROTOCOLS, EvalReport, Protocol, ProtocolResult
from vitreg_hub.evaluation.scores import classification_scores
from vitreg_hub.images.source import Images, ImageSource

logger = logging.getLogger(__name__)

PROBING: tuple[Protocol, ...] = ("knn", "linear", "logreg")
"""Protocols that learn from one feature of every image."""
