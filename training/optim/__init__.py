"""Optimisers and their groups of parameters."""
