"""Running in several processes."""
