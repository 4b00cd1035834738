"""Protocols on models: what the data allow, each image once for all protocols that read the same of it."""

import logging

from vitreg_hub.evaluation.results import Protocol

logger = logging.getLogger(__name__)

PROBING: tuple[Protocol, ...] = ("knn", "linear", "logreg")
"""Protocols that learn from one feature of every image."""
