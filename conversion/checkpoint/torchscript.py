"""Tensors of a TorchScript archive, in which OpenAI publishes CLIP; its code is neither compiled nor run."""

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreg_hub.conversion.checkpoint.pickles import MAX_TENSORS
from vitreg_hub.conversion.checkpoint.readers import BROKEN_PICKLE, Reader, TensorInfo
from vitreg_hub.errors import ConversionError

DTYPES = {
    "HalfStorage": (torch.float16, "F16"),
    "FloatStorage": (torch.float32, "F32"),
    "DoubleStorage": (torch.float64, "F64"),
    "BFloat16Storage": (torch.bfloat16, "BF16"),
    "LongStorage": (torch.int64, "I64"),
    "IntStorage": (torch.int32, "I32"),
    "BoolStorage": (torch.bool, "BOOL"),
}


MAX_DEPTH = 50
"""Modules within modules; one may hold itself."""


class _Module:
    """An object of the archive, reduced to its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Stored:
    """A tensor that was not read: which record holds it, and where in there."""

    def __init__(self, storage: tuple[str, str], offset: int, size: tuple, stride: tuple, *_: Any) -> None:
        (self.kind, self.record), self.offset, self.shape, self.stride = storage, offset, tuple(size), tuple(stride)
        if not all(type(number) is int and number >= 0 for number in (offset, *self.shape, *self.stride)):
            raise pickle.UnpicklingError("a tensor whose sizes are no whole numbers")


class _Unpickler(pickle.Unpickler):
    """Knows tensors and objects with attributes; any other name ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Stored
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch.jit._pickle":  # lists with a type
            return lambda values, *_: values
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, kind, record, *_ = pid
        if not (isinstance(kind, str) and isinstance(record, str)):
            raise pickle.UnpicklingError("a tensor that is in no record")
        return kind, record


class TorchScriptReader(Reader):
    """The tensors of a TorchScript archive.

    Raises:
        ConversionError: The archive is damaged or holds something other than modules and tensors.
    """

    container = "torchscript"
    left_out = ("code/",)

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("/data.pkl")
                model = _Unpickler(io.BytesIO(archive.read(f"{self._root}/data.pkl"))).load()
            self._stored = dict(_tensors(model))
            self.infos = {name: TensorInfo(s.shape, DTYPES[s.kind][1]) for name, s in self._stored.items()}
        except (pickle.UnpicklingError, StopIteration, *BROKEN_PICKLE) as error:
            raise ConversionError(
                f"{path} is a TorchScript archive that holds something other than modules and tensors, or is damaged "
                f"({error}); nothing of it was run."
            ) from error

    def read(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            with zipfile.ZipFile(self._path) as archive:
                data = archive.read(f"{self._root}/data/{stored.record}")
            flat = torch.frombuffer(bytearray(data), dtype=DTYPES[stored.kind][0])
            return flat.as_strided(stored.shape, stored.stride, stored.offset)
        except BROKEN_PICKLE as error:
            raise ConversionError(f"{self._path} is damaged: {name} cannot be read ({error}).") from error


def _tensors(model: Any) -> Iterator[tuple[str, _Stored]]:
    """The tensors of a module and of those inside, by their names; a module that others share counts for each."""
    waiting, num_seen = [("", model)], 0
    while waiting:
        name, value = waiting.pop()
        num_seen += 1
        if num_seen > 4 * MAX_TENSORS or name.count(".") > MAX_DEPTH:
            raise pickle.UnpicklingError("more modules than any ViT has")
        if isinstance(value, _Stored):
            yield name, value
        elif isinstance(value, _Module) and isinstance(getattr(value, "attributes", None), dict):
            inner = [(f"{name}.{key}" if name else key, part) for key, part in value.attributes.items()
                     if isinstance(key, str) and isinstance(part, _Stored | _Module)]  # fmt: skip
            waiting += reversed(inner)
