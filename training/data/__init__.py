"""Images of a run: opened, sampled, loaded, augmented."""
