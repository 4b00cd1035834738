"""Figures of a report, made from its results alone."""
