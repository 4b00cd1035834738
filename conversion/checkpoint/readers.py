"""Open files of weights: shapes and types at once, tensors only when asked for."""

import argparse
import math
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitreg_hub.conversion.checkpoint.file_kinds import refuse_other_archive
from vitreg_hub.conversion.checkpoint.pickles import MAX_TENSORS, require_bounded_pickle
from vitreg_hub.conversion.checkpoint.sets import MAX_KEY, fitting, is_averaged, require_one, sets_in
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import LARGE_HEADER, has_large_header

MAPPED_AT_ONCE = 320 * 2**20
"""Bytes that are read before a file is mapped again: pages that were touched count as memory until then."""

MAX_DESCRIPTION = 16 * 2**20
"""Bytes of everything in an archive that is not a tensor."""
SHARED, SPARE = 2, 16 * 2**20
"""Times that a file's bytes may be used, by tensors that share or repeat them, and bytes beyond that."""

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
    """An open file of weights; what its kind of file does not have is empty.

    Attributes:
        container: Key of the dictionary that holds the weights.
    """

    infos: Mapping[str, TensorInfo]
    container: str = ""
    keys: tuple[str, ...] = ()
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
        if has_large_header(path):
            raise ConversionError(f"{path} {LARGE_HEADER}.")
        try:
            with safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self.infos = {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} is truncated or no safetensors file ({error}): get it again.") from error


LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A record's own header in a zip archive: its mark, and the lengths of the name and of the extra field after it."""
PICKLES = 5
"""How many a file of torch.save before version 1.6 begins with."""
DESCRIPTOR = b"PK\7\x08"
"""Mark of what may stand between a record and the next."""


def require_whole_archive(path: Path) -> bool:
    """Refuse a zip archive whose directory and records contradict each other, as torch would read the wrong bytes.

    Checksums are compared for the small records that describe the tensors; torch compares none.

    Returns:
        Whether it is a TorchScript archive.

    Raises:
        ConversionError: They do, the archive cannot be read or asks for too much, or torch.save did not write it.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            records = sorted(archive.infolist(), key=lambda record: record.header_offset)
            refuse_other_archive(path, archive.namelist())
            described = sum(record.file_size for record in records if "/data/" not in record.filename)
            if len(records) > 2 * MAX_TENSORS or described > MAX_DESCRIPTION:
                raise ConversionError(
                    f"{path} describes its tensors in {len(records)} records and {described} bytes, more than any ViT "
                    "needs: save the model's state_dict alone."
                )
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
                content = b"" if is_tensor else archive.read(record)
                if record.filename.endswith(".pkl"):
                    require_bounded_pickle(BytesIO(content), called=str(path))
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except ConversionError:
        raise
    except BROKEN_PICKLE as error:
        raise ConversionError(f"{path} is damaged ({type(error).__name__}: {error}): get it again.") from error


def require_stored(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors that are much larger than the file that holds them: views that repeat a few numbers.

    Raises:
        ConversionError: They are.
    """
    sizes = {name: BYTES.get(info.dtype, 1) * math.prod(info.shape) for name, info in infos.items()}
    size = path.stat().st_size
    if sum(sizes.values()) > SHARED * size + SPARE:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConversionError(
            f"{path} has {size} bytes, but its tensors would take {sum(sizes.values())}, most of them {largest} "
            f"{list(infos[largest].shape)}: save a state_dict of contiguous tensors."
        )


NAMES_OF_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}


class PickleReader(_Mapped):
    """A file of `torch.save`. Only tensors and plain data are unpickled: nothing in it can run.

    Args:
        weights: Which of several sets, as for `sets.fitting`.
        zipped: Whether it is a zip archive, which `require_whole_archive` has seen.
    """

    def __init__(self, path: Path, *, weights: str = "", zipped: bool = False) -> None:
        super().__init__(lambda: sets_in(self._load())[self.container].__getitem__)
        self._path, self._zipped = path, zipped
        content = self._load()
        sets = sets_in(content)
        if not sets:
            raise ConversionError(f"{path} holds no dictionary of tensors: save the model's state_dict.")
        found = fitting(sets, weights) or fitting(sets, "")  # else it may be a prefix of names
        self.container, self.keys = require_one(found, sets, weights, called=str(path)), tuple(sets)
        tensors = sets[self.container]
        self.left_out = tuple(sorted(_beside(content, self.container), key=lambda key: (not is_averaged(key), key)))
        self.infos = {name: TensorInfo(tuple(tensor.shape), _kind(tensor)) for name, tensor in tensors.items()}
        self._get = tensors.__getitem__
        if not self._zipped:  # what torch.save wrote before version 1.6 cannot be mapped: it is in memory as a whole
            self._bytes_left = math.inf

    def _load(self) -> Any:
        try:
            if not self._zipped:
                with self._path.open("rb") as file:
                    require_bounded_pickle(file, called=str(self._path), pickles=PICKLES)
            with torch.serialization.safe_globals(list(HARMLESS)):
                return torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._zipped)
        except ConversionError:
            raise
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))  # torch's own sentence advises to allow it
            if asked and re.search(r"torch\.distributed", asked[1]):
                raise ConversionError(
                    f"{self._path} is a part of a sharded run (it holds {asked[1]}): merge the ranks first."
                ) from error
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


def _beside(content: Mapping[Any, Any], container: str, path: str = "") -> Iterator[str]:
    """Everything in a file that is not the set of weights that was chosen, by its keys."""
    for key, value in content.items():
        name = f"{path}{key}" if isinstance(key, str | int) else f"{path}({type(key).__name__})"
        if isinstance(value, Mapping) and f"{container}.".startswith(f"{name}."):
            yield from _beside(value, container, f"{name}.")
        elif f"{container}." != (path or ".") or not isinstance(value, Tensor):
            yield name if len(name) <= MAX_KEY and name.isprintable() else f"{name[:MAX_KEY]!a} ..."
