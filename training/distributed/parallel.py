"""One network in several processes: DDP through accelerate, FSDP2 through torch, and states that depend on neither.

accelerate's own FSDP2 supports only one module and no CPU, but tasks also have frozen modules to shard.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from vitreg_hub.compat import move_towards

BLOCK = re.compile(r"(.*\.)?(blocks|resblocks)\.\d+")
"""Names of the modules that are sharded, gathered and compiled one by one, in timm and in open_clip."""

COUNTS = ("step",)
"""Keys of an optimiser's groups whose values change, besides the rates, which follow from the step."""


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks of all towers."""
    return (child for name, child in module.named_modules() if BLOCK.fullmatch(name))


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard a module's parameters over all processes, block by block, in place."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    # for a module without gradients, no backward pass would ever shard the root's parameters again
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def wrap(module: nn.Module, accelerator: Accelerator, *, fsdp2: bool, trained: bool = True) -> nn.Module:
    """Put a module on the device and prepare it for several processes; its forward pass runs under autocast."""
    module.to(accelerator.device)
    if next(module.parameters(), None) is None:  # only buffers, whose owners keep them equal
        return module
    if fsdp2:
        shard(module, accelerator)
    return accelerator.prepare_model(module, evaluation_mode=fsdp2 or not trained)  # evaluation mode means no DDP


@contextmanager
def gradients_synced(network: nn.Module, accelerator: Accelerator, *, wanted: bool) -> Iterator[None]:
    """Exchange gradients between processes in the backward pass, or leave that to a later part of the step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)
        yield
        return
    with nullcontext() if wanted else accelerator.no_sync(network):
        yield


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's whole weights one at a time; all processes must read all of them."""
    for name, tensor in module.state_dict().items():
        yield name, full(tensor.detach())


def kept(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Collect whole tensors on the CPU of one process (`keep`), so that no GPU holds more than one at a time."""
    return {name: tensor.cpu() for name, tensor in tensors if keep}


@torch.no_grad()
def write_full(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        # every process has the value already, so none needs to send it
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def copy_whole(source: nn.Module, target: nn.Module) -> None:
    """Write a module's weights into an unsharded one with the same names; all processes must call it.

    A matrix that torch computes of several (`torch.nn.utils.parametrize`) is written as it results.
    """
    own = target.state_dict()
    for name, tensor in full_tensors(source):
        layer, computed, part = name.partition(".parametrizations.weight.")
        if not computed:
            write_full(own[name], tensor)
        elif part == "original":
            write_full(own[f"{layer}.weight"], cast(Tensor, source.get_submodule(layer).weight).detach())


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write whole weights into a module that may be sharded.

    Raises:
        KeyError: The names differ.
    """
    own = module.state_dict()
    if own.keys() != state.keys():
        raise KeyError(f"weights of other names: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, tensor in own.items():
        write_full(tensor, state[name])


def full_optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the whole tensors of an optimiser's state as ``name/key``, with the parameters' names."""
    for parameter, entry in optimizer.state.items():
        for key, value in entry.items():
            yield f"{names[parameter]}/{key}", full(value) if isinstance(value, Tensor) else torch.tensor(value)


def group_counts(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What an optimiser counts by group, such as steps: numbers, or for a tensor its number and type."""
    return [
        {
            key: [value.item(), str(value.dtype).removeprefix("torch.")] if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key in COUNTS
        }
        for group in optimizer.param_groups
    ]


def load_group_counts(optimizer: Optimizer, counts: Sequence[Mapping[str, Any]]) -> None:
    """Set what `group_counts` gave.

    Raises:
        ValueError: The number of groups differs.
    """
    for group, numbers in zip(optimizer.param_groups, counts, strict=True):
        for key, value in numbers.items():
            if isinstance(value, list | tuple):
                value = torch.tensor(value[0], dtype=getattr(torch, value[1]))
            group[key] = value


def load_optimizer_state(optimizer: Optimizer, names: Mapping[Tensor, str], state: Mapping[str, Tensor]) -> None:
    """Set an optimiser's state to what `full_optimizer_tensors` gave.

    Raises:
        KeyError: It is of other parameters.
    """
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, field = key.rpartition("/")
        entries.setdefault(name, {})[field] = value
    if unknown := entries.keys() - set(names.values()):
        raise KeyError(f"an optimizer of other weights: {sorted(unknown)[:3]}")
    for parameter, name in names.items():
        for field, value in entries.get(name, {}).items():
            if value.shape == parameter.shape:
                like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                write_full(like, value)
                value = like
            elif value.ndim:
                value = value.to(parameter.device)
            elif value.dtype in (torch.int64, torch.float64):  # was a plain number
                value = value.item()
            optimizer.state[parameter][field] = value


@torch.no_grad()
def average_into(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """``target = momentum * target + (1 - momentum) * source`` for all parameters; equal ones stay unchanged.

    The parameters of `source` must include those of `target`, sharded alike.
    """
    sources = dict(source.named_parameters())
    pairs = [(local(parameter), local(sources[name])) for name, parameter in target.named_parameters()]
    move_towards([t for t, _ in pairs], [s for _, s in pairs], 1 - momentum)
