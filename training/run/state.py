"""The files of a checkpoint's state: they carry checksums, and are read back only as they were written."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg_hub import typed
from vitreg_hub.files import SHA256, checksum
from vitreg_hub.training.run.folders import STATE, state_file

STATE_FILE, CHECKSUM, FILES = "state.json", "sha256", "files"
"""The file of all that are no tensors, and its keys for the checksums of the rest of it and of the other files."""


def write_state(checkpoint: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write the state, with checksums of all that is read back: a damaged file would give other weights in silence."""
    (checkpoint / STATE).mkdir()
    files = []
    for name, tensors in weights.items():
        if tensors:
            files.append(state_file(checkpoint, name))
            whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(whole, files[-1], metadata={"format": "pt"})
    data = {**state, FILES: _checksums(files)}
    (checkpoint / STATE / STATE_FILE).write_text(json.dumps({CHECKSUM: _checksum(data), **data}), encoding="utf-8")


def read_state(checkpoint: Path) -> Any:
    """The content of state.json; in that of older versions there are no checksums.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not as it was written.
    """
    data = typed.parsed((checkpoint / STATE / STATE_FILE).read_bytes())
    told = data.pop(CHECKSUM, None) if isinstance(data, dict) else None
    if told not in (None, _checksum(data)):
        raise ValueError(f"{STATE_FILE} is not as it was written")
    return data


def read_tensors(files: Sequence[Path], sums: Mapping[str, str] | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file, by its name without suffix.

    Args:
        files: Of a checkpoint's state.
        sums: The checksums by name; None in a checkpoint of an older version.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not as it was written.
        SafetensorError: A file does not hold tensors.
    """
    if sums is not None:
        found = _checksums(files)
        if wrong := [name for name in found if found[name] != sums.get(name)]:
            raise ValueError(f"{wrong[0]} is not as it was written")
    return {path.stem: load_file(path) for path in files}


def _checksums(files: Sequence[Path]) -> dict[str, str]:
    """The checksum of every file by its name, of several at a time."""
    with ThreadPoolExecutor() as threads:
        return dict(zip((file.name for file in files), threads.map(partial(checksum, like=SHA256), files), strict=True))


def _checksum(state: Mapping[str, Any]) -> str:
    return checksum(json.dumps(state).encode(), like=SHA256)
