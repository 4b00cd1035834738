"""From names, shapes and configs to a plan, before any weight is read."""
