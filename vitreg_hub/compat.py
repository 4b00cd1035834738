"""Private parts of other libraries that this package relies on, each with the reason and the version it was seen in."""

from collections.abc import Sequence

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers.utils.output_capturing import _active_collector


def wants_attentions() -> bool:
    """Whether the running call of a transformers model was asked for attention weights.

    transformers hands `output_attentions` to a collector around the model, not to the layers, and fused kernels never
    form the weights, so a layer must ask. Seen in transformers 5.23 and 5.24 (`utils/output_capturing.py`).
    """
    return "attentions" in (_active_collector.get() or ())


def forget_accelerator() -> None:
    """Let the next `Accelerator` choose its precision anew.

    accelerate keeps the first choice as long as the process lives. Seen in accelerate 1.15 (`state.py`).
    """
    AcceleratorState._reset_state()


def move_towards(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """``averages += weight * (values - averages)`` in few kernels, for which torch has no public name.

    Seen in torch 2.14 and 2.15; torch's own `swa_utils` calls it as well.
    """
    torch._foreach_lerp_(list(averages), list(values), weight)
