"""Objectives, one module each; `vitreg_hub.training.task` says what they have in common."""
