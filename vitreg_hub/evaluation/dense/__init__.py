"""How much a ViT's patches tell about every pixel: its class, and how far away it is."""
