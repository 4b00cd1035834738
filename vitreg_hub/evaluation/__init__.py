"""What features are good for: how well a ViT's tokens serve to recognise, without training the ViT."""
