"""Settings of image-text contrast."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrastive:
    """Images against captions, as in OpenCLIP.

    Attributes:
        text_width: Of the text tower.
        text_heads: Attention heads of the text tower.
        text_layers: Blocks of the text tower.
        context_length: Tokens of a caption.
        embed_dim: Width of the space that images and texts share.
        logit_scale: Of the similarities, at the start.
        local_loss: Whether each process takes the loss of its own rows only, which saves memory.
        templates: Sentences around a class's name for zero-shot classification, with {} in its place.
    """

    text_width: int = 512
    text_heads: int = 8
    text_layers: int = 12
    context_length: int = 77
    embed_dim: int = 512
    logit_scale: float = 1 / 0.07
    local_loss: bool = False
    templates: tuple[str, ...] = ("a photo of a {}.",)
