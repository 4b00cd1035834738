"""The networks of timm and transformers: where their parts are, and what JSON cannot tell plain timm."""
