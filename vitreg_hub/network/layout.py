"""Where timm and transformers keep the parts of a ViT that the token view reads."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from vitreg_hub.errors import DataError

FINAL_NORMS = ("norm", "fc_norm", "layernorm", "post_layernorm")
"""The norm after the last block: timm and DINOv3, timm after pooling, transformers' ViT and Dinov2, CLIP and SigLIP."""
HF_ATTENTIONS = ("attention", "self_attn")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Linear layers of queries, keys and values where they are not one, `qkv`, in timm and transformers."""
SUPPORTED = (
    "timm's VisionTransformer, Eva and Beit and transformers' Dinov2, Dinov2WithRegisters, DINOv3ViT, ViT, DeiT, CLIP "
    "and SigLIP can be"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VitLayout:
    """The parts of a ViT under common names. The modules are the model's own.

    Attributes:
        network: timm's or transformers' network, without heads and training wrappers.
        blocks: Transformer blocks, in order. Each gives tokens [B, N, D]: class, registers, patches.
        norm: The norm after the last block. CLIP and SigLIP apply theirs after pooling; here it is for all tokens.
        embedding: The convolution that makes patches into tokens, before positions are added.
        residual_scale: How many times larger the network's residual stream is than its model's (`residual_scale.py`).
    """

    network: Any  # a module, whose parts have no types
    blocks: tuple[nn.Module, ...]
    norm: nn.Module
    embedding: nn.Conv2d
    num_registers: int
    residual_scale: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Find the parts of a timm or transformers model, which may be compiled or wrapped by DDP.

        Raises:
            DataError: It is not a ViT that keeps all its tokens from block to block.
        """
        network: Any = unwrapped(model)
        scale = 1.0
        if hasattr(network, "timm_model"):
            scale = getattr(network.config, "residual_scale", 1.0)
            network = network.timm_model
        if isinstance(network, PreTrainedModel):
            network = next((m for m in network.modules() if _embeds_patches(m)), network)
            depth = getattr(network.config, "num_hidden_layers", 0)
            stacks = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
            num_registers = getattr(network.config, "num_register_tokens", 0)
            embeddings = [m for m in network.modules() if isinstance(m, nn.Conv2d)][:1]
        else:
            stacks = [m for m in [getattr(network, "blocks", None)] if isinstance(m, nn.Sequential | nn.ModuleList)]
            registers = getattr(network, "reg_token", None)
            num_registers = 0 if registers is None else registers.shape[1]
            projection = getattr(getattr(network, "patch_embed", None), "proj", None)
            embeddings = [projection] if isinstance(projection, nn.Conv2d) else []
        norms = [m for m in (getattr(network, name, None) for name in FINAL_NORMS) if isinstance(m, nn.Module)]
        if not (stacks and norms and embeddings):
            raise DataError(f"{type(model).__name__} cannot be read: {SUPPORTED}.")
        return cls(
            network=network,
            blocks=tuple(stacks[0]),
            norm=next((norm for norm in norms if not isinstance(norm, nn.Identity)), norms[0]),
            embedding=embeddings[0],
            num_registers=num_registers,
            residual_scale=scale,
        )

    def forward(self, images: Tensor, *, whole: nn.Module | None = None) -> Callable[[], object]:
        """What runs the network on images [B, 3, height, width], on its own device and in its own type.

        Args:
            images: Preprocessed.
            whole: The model around the network, to run it with its head.

        Raises:
            DataError: It takes only images of another size, or has no head.
        """
        images = images.to(self.embedding.weight.device, self.embedding.weight.dtype)
        model: Any = self.network if whole is None else unwrapped(whole)
        if whole is not None and not has_classes(model):
            raise DataError(f"a {type(model).__name__} without classes cannot classify: give a model with a head.")
        if not isinstance(self.network, PreTrainedModel):
            patches = self.network.patch_embed
            if getattr(patches, "strict_img_size", False) and tuple(images.shape[-2:]) != tuple(patches.img_size):
                raise DataError(
                    f"the images have {images.shape[-2]} x {images.shape[-1]} pixels, but the model was built for "
                    f"{patches.img_size[0]} x {patches.img_size[1]}: give img_size or dynamic_img_size=True."
                )
            return partial(self.network.forward_features if whole is None else model, images)
        resizes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        size = self.network.config.image_size
        native = (size, size) if isinstance(size, int) else tuple(size)
        options = {"interpolate_pos_encoding": True} if resizes and tuple(images.shape[-2:]) != native else {}
        return partial(model, pixel_values=images, **options)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images [B, 3, height, width]."""
        height, width = images.shape[-2:]
        cut = getattr(getattr(self.network, "patch_embed", None), "dynamic_feat_size", None)
        if cut is not None:
            rows, columns = cut((height, width))
            return rows, columns
        down, right = self.embedding.stride
        return height // down, width // right

    def attention(self, block: int) -> nn.Module:
        """The attention layer of a block, whose calls `attention_weights` understands.

        Raises:
            DataError: The block keeps its attention in an unknown place.
        """
        for name in ("attn", *HF_ATTENTIONS, None):
            layer: Any = self.blocks[block] if name is None else getattr(self.blocks[block], name, None)
            layer = getattr(layer, "kernel", layer)  # our transformers models, whose kernel users choose
            if hasattr(layer, "attn_drop") or hasattr(layer, "config"):
                return layer
        raise DataError(f"the attention of a {type(self.blocks[block]).__name__} cannot be read: {SUPPORTED}.")

    def projecting(self, block: int) -> nn.Module:
        """The layer of a block that projects tokens to queries, keys and values, as `projected` understands it.

        Raises:
            DataError: The block has none, or several.
        """
        layers = [m for m in self.blocks[block].modules() if hasattr(m, "qkv") or hasattr(m, PROJECTIONS[0])]
        if len(layers) != 1:
            raise DataError(f"the keys of a {type(self.blocks[block]).__name__} cannot be read: {SUPPORTED}.")
        return layers[0]


def projected(layer: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, N, D] of the tokens that a layer is called with, before its norms and rotation."""
    if getattr(layer, "qkv", None) is None:
        queries, keys, values = (getattr(layer, name)(tokens) for name in PROJECTIONS)
        return queries, keys, values
    fused = layer.qkv(tokens)
    if getattr(layer, "q_bias", None) is not None:  # Eva and Beit, whose keys have none
        fused = fused + torch.cat([layer.q_bias, layer.k_bias, layer.v_bias])
    queries, keys, values = fused.chunk(3, dim=-1)
    return queries, keys, values


def attention_weights(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Attention weights [B, H, N, N] of a call, by the library's own code that forms them.

    Fused kernels never form the weights, so the layer runs once more without them or dropout, and is then restored.

    Raises:
        DataError: The layer never forms them.
    """
    if hasattr(layer, "attn_drop"):  # timm
        found: list[Tensor] = []
        handle = layer.attn_drop.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
        try:
            unfused = {"fused_attn": False} if hasattr(layer, "fused_attn") else {}
            with _replaced(layer, **unfused):
                layer.forward(*args, **kwargs)
        finally:
            handle.remove()
        if not found or found[0].ndim != 4:
            raise DataError(f"the attention of a {type(layer).__name__} cannot be read: {SUPPORTED}.")
        return found[0]
    config = copy.copy(layer.config)
    config._attn_implementation = "eager"
    # masks of the flexible kernel mask nothing here: images have no padding
    args = tuple(value if isinstance(value, Tensor) else None for value in args)
    if "attention_mask" in kwargs:
        kwargs = kwargs | {"attention_mask": None}
    with _replaced(layer, config=config):
        return layer.forward(*args, **kwargs)[1]


def uncompiled() -> AbstractContextManager[None]:
    """Run compiled code uncompiled, because it has no hooks.

    Importing torch._dynamo takes a second; where code was compiled, it is imported.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def logits_of(output: Any) -> Tensor:
    """What a classifier of timm or transformers gives, [B, classes]."""
    return output if isinstance(output, Tensor) else output.logits


def has_classes(model: Any) -> bool:
    """Whether a model of timm or transformers has a head that tells classes."""
    if isinstance(model, PreTrainedModel):
        return "ImageClassification" in type(model).__name__
    return getattr(model, "num_classes", 0) > 0


@contextmanager
def _replaced(module: nn.Module, **values: Any) -> Iterator[None]:
    old = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(module, name, value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients, and restore the mode of every module afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _embeds_patches(module: nn.Module) -> bool:
    """Whether this is transformers' vision network itself, not the model around it or a text tower."""
    embeddings = getattr(module, "embeddings", None)
    return isinstance(embeddings, nn.Module) and any(isinstance(m, nn.Conv2d) for m in embeddings.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module below torch.compile and data-parallel training, in whichever order they were applied."""
    while True:
        if hasattr(model, "_orig_mod"):  # OptimizedModule, whose import takes a second
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model
