"""A network that a stranger's configuration describes is built only if the weights beside it could fill it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vitreg_hub.errors import BundleError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
SPARE = 2**25
"""Numbers that no file holds: buffers, and what is computed on the way to them."""
EACH = 2**13
"""What a tensor costs beside its numbers: thousands of small ones take seconds."""
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}


class AtMost(TorchFunctionMode):
    """Within it, this thread makes no more numbers than weights of so many bytes could hold, and `SPARE`.

    Raises:
        BundleError: It is to make more, before they take memory.
    """

    def __init__(self, stored: int, *, called: str) -> None:
        super().__init__()
        self._stored, self._called, self._left = stored, called, stored + SPARE

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a function is going to make."""
        kwargs = kwargs or {}
        if func in FACTORIES:
            self._left -= func(*args, **{**kwargs, "device": "meta", "pin_memory": False}).numel() + EACH
            if self._left < 0:
                raise BundleError(
                    f"the config.json of {self._called} describes a network that its weights of {self._stored:,} bytes "
                    "cannot fill: get both again."
                )
        return func(*args, **kwargs)


def weights_in(folder: Path) -> Iterator[Path]:
    """The files of weights in a folder, by their suffixes."""
    return (path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
