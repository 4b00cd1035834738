"""Self-distillation, as in DINOv2."""
