"""`vitreg export`."""

from vitreg_hub.console import hide_loading


def run(bundle: str, out: str, *, format: str) -> None:
    """Write a bundle in the form of a lineage that can hold it.

    Args:
        bundle: folder, hf-hub:org/name, or an architecture with weights
        out: new folder for hf-... formats, new .pth or .safetensors file for others
        format: deit, deit3, dino, dinov2, hf-clip, hf-deit, hf-dinov2, hf-dinov2-with-registers, hf-vit, openclip, timm
    """
    from vitreg_hub.conversion.exporter import export

    hide_loading()
    print(export(bundle, out, format=format))
