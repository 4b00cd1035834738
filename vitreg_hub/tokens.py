"""One view of what happens inside any ViT: its tokens by name, block by block, and its attention maps."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.network.layout import VitLayout, attention_weights, evaluating, logits_of, projected, uncompiled

# Shapes: B images; N = C + R + P tokens, of which C class tokens, R registers and P patches; D channels; H heads.


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens by name.

    Attributes:
        cls: [B, C, D]; C is 1, 0 without a class token, or 2 with a distillation token, which comes second.
        registers: [B, R, D].
        patches: [B, P, D], row by row.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Attention weights of one block.

    Attributes:
        weights: [B, H, N, N] in the order class, registers, patches; every row sums to 1.
        cls: [B, H, C, rows, columns] from class tokens to patches.
        registers: [B, H, R, rows, columns] from registers to patches.
    """

    weights: Tensor
    cls: Tensor
    registers: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Projections:
    """What the attention of one block makes of its tokens, heads side by side, before norms of its own and rotation.

    Attributes:
        queries: Tokens by name.
        keys: Tokens by name.
        values: Tokens by name.
    """

    queries: Tokens
    keys: Tokens
    values: Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenOrder:
    """Which token is what: class tokens, then registers, then a grid of patches. By default there are none."""

    num_class: int = 0
    num_registers: int = 0
    grid: tuple[int, int] = (0, 0)

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches."""
        return self.num_class + self.num_registers

    @property
    def class_names(self) -> tuple[str, ...]:
        """What class tokens are called: "class", and "class 2" for a distillation token."""
        return ("class", "class 2")[: self.num_class]

    @property
    def register_names(self) -> tuple[str, ...]:
        """What registers are called: "register 1", ..."""
        return tuple(f"register {i}" for i in range(1, self.num_registers + 1))

    def split(self, tokens: Tensor) -> Tokens:
        """Name tokens [B, N, D]."""
        return Tokens(
            cls=tokens[:, : self.num_class],
            registers=tokens[:, self.num_class : self.num_prefix],
            patches=tokens[:, self.num_prefix :],
        )

    def attention(self, weights: Tensor) -> Attention:
        """Name attention weights [B, H, N, N]."""
        to_patches = weights[:, :, : self.num_prefix, self.num_prefix :].unflatten(-1, self.grid)
        return Attention(
            weights=weights, cls=to_patches[:, :, : self.num_class], registers=to_patches[:, :, self.num_class :]
        )

    def projections(self, queries: Tensor, keys: Tensor, values: Tensor) -> Projections:
        """Name projected tokens [B, N, D]."""
        return Projections(queries=self.split(queries), keys=self.split(keys), values=self.split(values))


NOTHING = torch.empty(0)
NO_TOKENS = Tokens(cls=NOTHING, registers=NOTHING, patches=NOTHING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one forward pass showed of one batch; anything that was not asked for is empty.

    Attributes:
        images: [B, 3, height, width] as the network saw them.
        norms: [blocks, B, N] float32 L2 norms of all tokens after every block, before the final norm.
        input_norms: [B, N] float32 L2 norms of the tokens that enter the first block.
        tokens: Tokens after the blocks asked for, before the final norm, by the indices that were given.
        normed: Tokens of the last block after the final norm.
        normed_blocks: Tokens after the blocks asked for and then the final norm, by the indices that were given.
        embedded: [B, P, D] patch embeddings, before positions are added.
        attention: Attention of the blocks asked for, by the indices that were given.
        logits: [B, classes] of the model's own head.
        projections: Queries, keys and values of the blocks asked for, by the indices that were given.
    """

    images: Tensor
    order: TokenOrder
    norms: Tensor = NOTHING
    input_norms: Tensor = NOTHING
    tokens: dict[int, Tokens] = field(default_factory=dict)
    normed: Tokens = NO_TOKENS
    normed_blocks: dict[int, Tokens] = field(default_factory=dict)
    embedded: Tensor = NOTHING
    attention: dict[int, Attention] = field(default_factory=dict)
    logits: Tensor = NOTHING
    projections: dict[int, Projections] = field(default_factory=dict)


Reader = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""Takes what a hook is given, (module, arguments, keyword arguments, output), and returns what to keep."""


def observe(
    model: nn.Module,
    images: Tensor,
    *,
    norms: bool = False,
    blocks: Sequence[int] = (),
    normed: bool = False,
    normed_blocks: Sequence[int] = (),
    embedded: bool = False,
    attention: Sequence[int] = (),
    attention_images: int | None = None,
    logits: bool = False,
    projections: Sequence[int] = (),
) -> Observation:
    """Run a ViT on images once and record only what is asked for.

    The network runs without gradients and in evaluation mode; its own modes are restored afterwards.

    Args:
        model: A ViT of timm or transformers, with or without a head, also compiled or in training.
        images: [B, 3, height, width], preprocessed; moved to the model's device and type.
        norms: Record the norms of all tokens after every block, and before the first.
        blocks: Blocks whose tokens are recorded; negative indices count from the end.
        normed: Record the tokens of the last block after the final norm.
        normed_blocks: Blocks whose tokens are recorded after the final norm, as if they were the last.
        embedded: Record the patch embeddings.
        attention: Blocks whose attention is recorded; negative indices count from the end.
        attention_images: Record the attention, which costs most, of only so many images, the first ones; by default of
            all.
        logits: Run the model's head as well, and record what it gives.
        projections: Blocks whose queries, keys and values are recorded; negative indices count from the end.

    Raises:
        DataError: The model is not a ViT that can be read, has no head, or a block does not exist.
    """
    layout = VitLayout.of(model)
    depth = len(layout.blocks)
    if wrong := [i for i in (*blocks, *normed_blocks, *attention, *projections) if not -depth <= i < depth]:
        raise DataError(f"block {wrong[0]} does not exist: the model has {depth}, 0 to {depth - 1} or -{depth} to -1.")
    found: dict[tuple[str, int], Any] = {}
    with evaluating(model), uncompiled(), ExitStack() as hooks:

        def record(what: str, index: int, module: nn.Module, read: Reader) -> None:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                found[what, index] = read(module, args, kwargs, output)

            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

        if norms:
            record("input_norms", 0, layout.blocks[0], _input_norms)
            for index, block in enumerate(layout.blocks):
                record("norms", index, block, _norms)
        if normed:
            record("tokens", -1, layout.blocks[-1], _output)
        for index in {*blocks, *normed_blocks}:
            record("tokens", index, layout.blocks[index], _output)
        for index in set(attention):
            record("attention", index, layout.attention(index), partial(_weights, number=attention_images))
        for index in set(projections):
            record("projections", index, layout.projecting(index), _projections)
        if embedded:
            record("embedded", 0, layout.embedding, _output)
        record("order", 0, layout.blocks[0], _count)
        output = layout.forward(images, whole=model if logits else None)()
        if normed:
            found["normed", 0] = layout.norm(found["tokens", -1])
        for index in set(normed_blocks):
            found["normed_blocks", index] = layout.norm(found["tokens", index])

    def unscaled(stream: Tensor) -> Tensor:
        return stream if layout.residual_scale == 1 else stream / layout.residual_scale

    order = _order(layout, images, num_tokens=found["order", 0])
    return Observation(
        images=images,
        order=order,
        norms=unscaled(torch.stack([found["norms", i] for i in range(depth)])) if norms else NOTHING,
        input_norms=unscaled(found["input_norms", 0]) if norms else NOTHING,
        tokens={i: order.split(unscaled(found["tokens", i])) for i in blocks},
        normed=order.split(found["normed", 0]) if normed else NO_TOKENS,
        normed_blocks={i: order.split(found["normed_blocks", i]) for i in normed_blocks},
        embedded=unscaled(found["embedded", 0]).flatten(2).transpose(1, 2) if embedded else NOTHING,
        attention={i: order.attention(found["attention", i]) for i in attention},
        logits=logits_of(output) if logits else NOTHING,
        projections={i: order.projections(*found["projections", i]) for i in projections},
    )


def block_tokens(model: nn.Module, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> dict[int, Tokens]:
    """Tokens of the residual stream after chosen blocks, before the final norm; arguments and errors as of `observe`.

    Returns:
        Tokens by block, by the indices that were given.
    """
    return observe(model, images, blocks=blocks).tokens


def attention_maps(model: nn.Module, images: Tensor, *, blocks: Sequence[int] = (-1,)) -> dict[int, Attention]:
    """Attention of chosen blocks, whichever kernel the model uses; arguments and errors as of `observe`.

    Fused kernels never form the weights, so they are computed again, only for these blocks.

    Returns:
        Attention by block, by the indices that were given: `weights` of all tokens, and the maps of the class token
        (`cls`) and of each register (`registers`) over the patches.
    """
    return observe(model, images, attention=blocks).attention


def _output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norms(*call: Any) -> Tensor:
    return torch.linalg.vector_norm(_output(*call), dim=-1, dtype=torch.float32)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _input_norms(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    return torch.linalg.vector_norm(_input(args, kwargs), dim=-1, dtype=torch.float32)


def _projections(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return projected(module, _input(args, kwargs))


def _weights(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, number: int | None
) -> Tensor:
    args = tuple(value[:number] if isinstance(value, Tensor) else value for value in args)
    if "hidden_states" in kwargs:
        kwargs = kwargs | {"hidden_states": kwargs["hidden_states"][:number]}
    return attention_weights(module, args, kwargs)


def _count(*call: Any) -> int:
    tokens = _output(*call)
    return tokens.shape[1] if tokens.ndim == 3 else 0


def _order(layout: VitLayout, images: Tensor, *, num_tokens: int) -> TokenOrder:
    grid = layout.grid(images)
    num_class = num_tokens - grid[0] * grid[1] - layout.num_registers
    if not 0 <= num_class <= 2:
        raise DataError(
            f"a {type(layout.network).__name__} does not keep one token per patch ({grid[0]} x {grid[1]} patches) "
            "from block to block, so it cannot be read."
        )
    return TokenOrder(num_class=num_class, num_registers=layout.num_registers, grid=grid)
