"""How much a ViT's tokens help to recognise things, without training the ViT."""
