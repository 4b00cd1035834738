"""Checkpoint files of others: opened, read one tensor at a time, written."""
