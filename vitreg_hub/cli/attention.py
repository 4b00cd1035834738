"""`vitreg attention`."""

from typing import Annotated

from vitreg_hub.cli.arguments import ImageSize, NumberType
from vitreg_hub.cli.values import analysis_options
from vitreg_hub.console import hide_loading


def run(
    model: str,
    *images: Annotated[str, "IMAGE"],
    out: str = "attention.png",
    heads: bool = False,
    block: int = -1,
    img_size: ImageSize = None,
    device: str | None = None,
    dtype: NumberType = "float32",
) -> None:
    """Draw what the class token and each register attend to in an image.

    Args:
        model: bundle's folder, hf-hub:org/name, a name of `list` or of a ViT of timm, with or without the tag
            of its weights
        *images: image files, one row each
        out: new PNG file
        heads: every head, not their mean
        block: block whose attention is drawn, from 0, or from the end
        img_size: size of the images, if not the model's own
        device: cpu, cuda, cuda:1, ...; a GPU if there is one
        dtype: number type of the model
    """
    from vitreg_hub.analysis.report.write import draw_attention

    hide_loading()
    options = analysis_options(block=block, img_size=img_size, device=device, dtype=dtype)
    print(draw_attention(model, images, out, heads=heads, **options))
