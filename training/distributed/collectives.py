"""Sums, maxima and concatenations over the processes of a run; with one process they return their input."""

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx, once_differentiable


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _running() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _running() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over processes, without gradients; `x` has the same shape in all of them and stays as it is."""
    return _all_reduced(x, distributed.ReduceOp.SUM) if _running() else x


def all_reduce_max(x: Tensor) -> Tensor:
    """Maximum over processes, without gradients; `x` has the same shape in all of them and stays as it is."""
    return _all_reduced(x, distributed.ReduceOp.MAX) if _running() else x


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks; gradients return to the process that a row came from.

    The gradient of a row is the sum over the losses of all processes. Where gradients are averaged, as by DDP and FSDP,
    a loss that is a mean over processes gets the same gradient as in one process with all rows. Each process gives
    equally many rows [b, D] and gets [world_size * b, D].
    """
    return _AllGather.apply(x) if _running() else x


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@torch.no_grad()
def _all_reduced(x: Tensor, op: distributed.ReduceOp.RedOpType) -> Tensor:
    reduced = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(reduced, op=op)
    return reduced


class _AllGather(torch.autograd.Function):
    """With public collectives, because those with gradients are deprecated or private in torch 2.15."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        gathered = x.new_empty(distributed.get_world_size() * x.shape[0], *x.shape[1:])
        distributed.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # one output
        own = grad.new_empty(grad.shape[0] // distributed.get_world_size(), *grad.shape[1:])
        distributed.reduce_scatter_tensor(own, grad.contiguous())
        return own
