"""What registers do: the same network with its registers zeroed, replaced by their mean, or taken from another image.

Zeroing alone overstates: no image gives such registers, so whatever follows meets something that it never saw.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.images.source import Batch
from vitreg_hub.network.layout import VitLayout
from vitreg_hub.tokens import observe

Intervention = Literal["zeroed", "mean", "shuffled"]
INTERVENTIONS: tuple[Intervention, ...] = ("zeroed", "mean", "shuffled")
DONORS = 64
"""Images whose registers are kept for others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisterBank:
    """The registers of some images after every block.

    Attributes:
        states: [blocks, K, R, D], in the network's own scale.
    """

    states: Tensor

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Batch], *, most: int = DONORS) -> "RegisterBank":
        """Keep the registers of the first images.

        Raises:
            DataError: The model has no registers, or there are no images.
        """
        layout = VitLayout.of(model)
        if not layout.num_registers:
            raise DataError("the model has no registers, so nothing can be done to them.")
        depth, kept, number = len(layout.blocks), [], 0
        for batch in batches:
            seen = observe(model, batch.images, blocks=range(depth))
            kept.append(torch.stack([seen.tokens[i].registers for i in range(depth)]) * layout.residual_scale)
            number += len(batch.images)
            if number >= most:
                break
        if not kept:
            raise DataError("there are no images whose registers could be taken.")
        return cls(states=torch.cat(kept, dim=1)[:, :most])


@contextmanager
def intervened(model: nn.Module, kind: Intervention, bank: RegisterBank) -> Iterator[None]:
    """Change what registers hold after every block while the block runs; the model is itself again afterwards.

    Where they are shuffled, an image's pixels choose which image of the bank gives its registers, the same ones after
    all blocks, so that the outcome does not depend on batches.

    Args:
        model: A ViT with registers.
        kind: What takes their place: zeros, the mean over the bank's images, or the registers of one of them.
        bank: From the same model, best on other images.
    """
    layout = VitLayout.of(model)
    number, registers = bank.states.shape[1], bank.states.shape[2]
    means = bank.states.mean(dim=1, keepdim=True)
    donors = torch.zeros(1, dtype=torch.int64)

    def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal donors
        pixels = args[0].detach().float().contiguous().view(torch.int32).flatten(1)
        donors = pixels.sum(dim=1, dtype=torch.int64) % number

    def replace(block: int):
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tokens = output[0] if isinstance(output, tuple) else output
            first = tokens.shape[1] - num_patches - registers
            new = {
                "zeroed": torch.zeros_like(means[block]),
                "mean": means[block],
                "shuffled": bank.states[block][donors.to(bank.states.device)],
            }[kind].to(tokens)
            changed = tokens.clone()
            changed[:, first : first + registers] = new
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal num_patches
        num_patches = output.shape[-2] * output.shape[-1]

    num_patches = 0
    with ExitStack() as hooks:
        hooks.callback(layout.embedding.register_forward_pre_hook(choose).remove)
        hooks.callback(layout.embedding.register_forward_hook(count).remove)
        for index, block in enumerate(layout.blocks):
            hooks.callback(block.register_forward_hook(replace(index), prepend=True).remove)
        yield
