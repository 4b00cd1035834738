"""What a checkpoint may be: one file per lineage, as data."""
