"""What models do with their tokens."""
