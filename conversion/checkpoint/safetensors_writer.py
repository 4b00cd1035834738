"""Writing a safetensors file one tensor at a time, so that no more than one is in memory."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

BYTES = 4  # float32
ALIGNMENT = 8


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write float32 tensors in the format of safetensors (github.com/huggingface/safetensors, README, "Format").

    Args:
        shapes: Shape of every tensor, in the order of the file.
        make: Returns the contiguous tensor of a name; called once for each, and the result is not kept.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        size = BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            tensor = make(name)
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name} has shape {list(tensor.shape)}, but {list(shape)} was planned")
            file.write(tensor.numpy().data.cast("B"))
            bar.update(tensor.nbytes)
