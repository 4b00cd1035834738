"""Doors 1 and 2 of a bundle: plain timm and plain transformers. Run as a script, where this package is not imported.

Usage: python -P plain_doors.py FOLDER IMAGES.safetensors OUTPUTS.safetensors
"""

import sys
from typing import cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, logging


def timm_outputs(model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Tokens, pooled features and, with a head, logits of a timm ViT."""
    network = cast(VisionTransformer, model)
    tokens = network.forward_features(images)
    outputs = {"tokens": tokens, "pooled": network.forward_head(tokens, pre_logits=True)}
    return outputs | ({"logits": network(images)} if network.num_classes else {})


def transformers_outputs(folder: str, images: Tensor, *, num_classes: int) -> dict[str, Tensor]:
    """The same from transformers' auto classes, whichever models they give."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)  # timm's doors always give float32
    encoded = model.eval()(images)
    outputs = {"tokens": encoded.last_hidden_state, "pooled": encoded.pooler_output}
    if num_classes:
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
        outputs["logits"] = model.eval()(images).logits
    return outputs


@torch.inference_mode()
def main(folder: str, images_file: str, outputs_file: str) -> None:
    """Open FOLDER through both doors and write what comes out."""
    logging.disable_progress_bar()
    images = load_file(images_file)["images"]
    model = cast(VisionTransformer, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    doors = {
        "timm": timm_outputs(model, images),
        "transformers": transformers_outputs(folder, images, num_classes=model.num_classes),
    }
    if "vitreg_hub" in sys.modules:
        raise RuntimeError("the plain doors were opened with vitreg_hub imported, which shows nothing")
    flat = {f"{door}.{name}": t.contiguous() for door, outputs in doors.items() for name, t in outputs.items()}
    save_file(flat, outputs_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
