"""`vitreg convert`."""

from typing import Annotated

from vitreg_hub.cli.arguments import ImageSize, OptionalN
from vitreg_hub.cli.values import image_size
from vitreg_hub.console import hide_loading
from vitreg_hub.files import TOWER_SUFFIX


def run(
    source: str,
    out: str,
    *,
    format: str = "auto",
    weights: Annotated[str | None, "SET"] = None,
    arch: str | None = None,
    img_size: ImageSize = None,
    registers: OptionalN = None,
    num_heads: OptionalN = None,
    act: str | None = None,
    license: Annotated[str | None, "ID"] = None,
    text_tower: bool = False,
    verify: bool = False,
) -> None:
    """Convert a checkpoint of another lineage to a bundle, exactly, or say why not.

    Args:
        source: weights file, folder, or hf-hub:org/name[@revision]
        out: new folder for the bundle
        format: auto, openclip-timm, openclip, openai, hf-clip, ph-reg, hf-dinov2-with-registers, hf-dinov2, hf-deit,
            hf-vit, dino, deit3, deit, dinov2, timm
        weights: which of several in the file: ema (averaged ones, the default), raw, a key, or a prefix of names
        arch: row of `vitreg list` that the checkpoint must be; settles heads and activation
        img_size: bake the position table for images of this size in
        registers: add untrained registers to a checkpoint that has none
        num_heads: attention heads, if nothing else settles them
        act: gelu or quick_gelu, if nothing else settles it
        license: if the source states none, or one that does not allow every use; or unknown
        text_tower: keep OpenCLIP's whole model beside the bundle
        verify: measure the difference to a reference implementation
    """
    from vitreg_hub.conversion.converter import convert

    hide_loading()
    bundle = convert(
        source,
        out,
        format=format,
        weights=weights,
        arch=arch,
        img_size=image_size(img_size),
        num_registers=registers,
        num_heads=num_heads,
        act=act,
        license=license,
        text_tower=text_tower,
        verify=verify,
    )
    print(bundle.provenance.conversion)
    print(f"bundle       {out}")
    if text_tower:
        print(f"both towers  {out.rstrip('/')}{TOWER_SUFFIX}")
