"""Open files of weights: shapes and types at once, tensors only when asked for."""

import argparse
import math
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitreg_hub.errors import ConversionError

MAPPED_AT_ONCE = 320 * 2**20
"""Bytes that are read before a file is mapped again: pages that were touched count as memory until then."""

CONTAINERS = ("teacher", "model", "state_dict", "module")
"""Keys under which training code saves the weights, the one to publish first."""

MAX_NESTING = 8
"""Containers within containers; a dictionary may hold itself."""

Global = Callable[..., object]
_scalar = cast(Global, np.float64(0).__reduce__()[0])  # numpy's numbers are pickled as a call of this
HARMLESS: tuple[Global | tuple[Global, str], ...] = (
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # its name since Python 3.13
    np.dtype,
    _scalar,
    (_scalar, "numpy.core.multiarray.scalar"),  # its name before numpy 2
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")),
)
"""What training code pickles beside the weights and what holds nothing but data; anything else is refused."""

BROKEN_PICKLE = (OSError, EOFError, MemoryError, struct.error, zipfile.BadZipFile, zlib.error)
BROKEN_PICKLE += (RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError)
"""What reading a damaged pickle can raise."""


class TensorInfo(NamedTuple):
    """Shape and type of a tensor that was not read."""

    shape: tuple[int, ...]
    dtype: str


class Reader:
    """An open file of weights; what its kind of file does not have is empty."""

    infos: Mapping[str, TensorInfo]
    container: str = ""
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = MappingProxyType({})

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        raise NotImplementedError


class _Mapped(Reader):
    """Reads through a memory map that is renewed, so that no more than a part of the file counts as memory."""

    def __init__(self, open_map: Callable[[], Callable[[str], Tensor]]) -> None:
        self._open_map = open_map
        self._get: Callable[[str], Tensor] | None = None
        self._bytes_left: float = MAPPED_AT_ONCE

    def read(self, name: str) -> Tensor:
        if self._get is None or self._bytes_left < 0:
            self._get = None  # the old map is closed first
            self._get, self._bytes_left = self._open_map(), MAPPED_AT_ONCE
        tensor = self._get(name)
        self._bytes_left -= tensor.nbytes
        return tensor


class SafetensorsReader(_Mapped):
    """A .safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: safe_open(path, "pt").get_tensor)
        try:
            with safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self.infos = {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} is truncated or no safetensors file ({error}): get it again.") from error


LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A record's own header in a zip archive: its mark, and the lengths of the name and of the extra field after it."""
DESCRIPTOR = b"PK\7\x08"
"""Mark of what may stand between a record and the next."""


def require_whole_archive(path: Path) -> None:
    """Refuse a zip archive whose directory and records contradict each other, as torch would read the wrong bytes.

    Checksums are compared for the small records that describe the tensors; torch compares none.

    Raises:
        ConversionError: They do, or the archive cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
            for record, end in zip(records, ends, strict=True):
                file.seek(record.header_offset)
                mark, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                start = record.header_offset + LOCAL_HEADER.size + name_length + extra_length
                is_same = mark == b"PK\3\4" and file.read(name_length) == record.orig_filename.encode()
                file.seek(start + record.compress_size)
                is_followed = start + record.compress_size == end or file.read(len(DESCRIPTOR)) == DESCRIPTOR
                is_tensor = "/data/" in record.filename
                is_plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
                if not is_same or not is_followed or (is_tensor and not is_plain):
                    raise zipfile.BadZipFile(f"the record {record.filename} is not where the directory says")
                if not is_tensor:
                    archive.read(record)
    except BROKEN_PICKLE as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error}): get it again.") from error


NAMES_OF_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class PickleReader(_Mapped):
    """A file of `torch.save`. Only tensors and plain data are unpickled: nothing in it can run."""

    def __init__(self, path: Path) -> None:
        super().__init__(lambda: _weights_in(self._load(), str(path))[1].__getitem__)
        self._path = path
        self._zipped = zipfile.is_zipfile(path)
        self.container, tensors, self.left_out = _weights_in(self._load(), str(path))
        self.infos = {name: TensorInfo(tuple(tensor.shape), _kind(tensor)) for name, tensor in tensors.items()}
        self._get = tensors.__getitem__
        if not self._zipped:  # what torch.save wrote before version 1.6 cannot be mapped: it is in memory as a whole
            self._bytes_left = math.inf

    def _load(self) -> Any:
        try:
            with torch.serialization.safe_globals(list(HARMLESS)):
                return torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._zipped)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))  # torch's own sentence advises to allow it
            cause = f" (it asks for {asked[1]})" if asked else ""
            raise ConversionError(
                f"{self._path} is no checkpoint of plain tensors, or is damaged, and nothing of it was run{cause}: "
                "save its state_dict alone."
            ) from error
        except BROKEN_PICKLE as error:
            raise ConversionError(
                f"{self._path} is truncated or no checkpoint ({type(error).__name__}): get it again, or save it anew."
            ) from error


def _kind(tensor: Tensor) -> str:
    """The type of a tensor's numbers as safetensors names it, or why it has none."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"{tensor.layout} on {tensor.device}"
    return NAMES_OF_DTYPES.get(tensor.dtype, str(tensor.dtype))


def _weights_in(loaded: Any, called: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """Find the weights in a file's content: where they are, the tensors, and the names of what stands beside them."""
    path: list[str] = []
    left_out: list[str] = []
    while isinstance(loaded, Mapping) and len(path) < MAX_NESTING:
        tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        inner = next((k for k in CONTAINERS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None or len(tensors) > len(loaded) / 2:
            if tensors:
                left_out += [".".join([*path, str(k)]) for k in loaded.keys() - tensors.keys()]
                return ".".join(path), tensors, tuple(sorted(left_out))
            break
        left_out += [".".join([*path, str(k)]) for k in loaded if k != inner]
        path.append(inner)
        loaded = loaded[inner]
    raise ConversionError(
        f"{called} holds no dictionary of tensors, bare or under {', '.join(CONTAINERS)}: save the model's state_dict."
    )
