"""Logging and evaluation of a run."""
