"""Opening checkpoints: files, shards, folders and repositories; tensors are only read when asked for."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreg_hub.bounded import read_json, read_small
from vitreg_hub.conversion.checkpoint.file_kinds import (
    INDEX,
    SAFETENSORS,
    SHARD,
    TORCH_ARCHIVE,
    choose,
    files_below,
    kind_of_file,
)
from vitreg_hub.conversion.checkpoint.pickles import MAX_TENSORS
from vitreg_hub.conversion.checkpoint.readers import (
    PickleReader,
    Reader,
    SafetensorsReader,
    TensorInfo,
    require_stored,
    require_whole_archive,
)
from vitreg_hub.conversion.checkpoint.sets import COUNTER, RAW, choice_note, fitting, is_averaged, prefix_of, unwrapped
from vitreg_hub.conversion.checkpoint.torchscript import TorchScriptReader
from vitreg_hub.errors import ConversionError, readable
from vitreg_hub.files import CONFIG_FILE, OPENCLIP_CONFIG, PREPROCESSOR_FILE
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.remote.download import download_checkpoint

HASHED_AT_ONCE = 16 * 2**20
"""Bytes; with fewer of them, the thread that hashes waits for the interpreter more than it works."""

MAX_NAME = 300
"""Characters of a tensor's name; no network has longer ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        source: The repository with its commit, or the name of the file or folder without the path to it.
        infos: Shape and type of every tensor, by name without what wrappers such as DDP add.
        places: The open file that holds a tensor, and the tensor's name in there.
        container: Key of the dictionary that held the weights, and their prefix if one was asked for; "torchscript" for
            an archive.
        notes: Which of several sets of weights it is.
        metadata: Texts by name in the header of a .safetensors file.
        config: config.json beside the weights; this and the other two are empty where there is no such file.
    """

    called: str
    source: str
    files: tuple[Path, ...]
    infos: Mapping[str, TensorInfo]
    places: Mapping[str, tuple[Reader, str]] = field(repr=False)
    container: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    openclip_config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        return self.files[0].parent

    def read(self, name: str) -> Tensor:
        """Read a tensor in float32.

        Raises:
            ConversionError: It holds float64 numbers that float32 cannot hold.
        """
        reader, stored_name = self.places[name]
        tensor = reader.read(stored_name).detach()
        exact = tensor.to(torch.float32)
        if tensor.dtype == torch.float64 and not torch.equal(exact.double().nan_to_num(), tensor.nan_to_num()):
            raise ConversionError(
                f"{self.called}: {name} holds float64 numbers that float32 cannot hold; round them first."
            )
        return exact

    def under(self, prefix: str, *, why: str) -> "Checkpoint":
        """The tensors whose names begin with a prefix and a dot, without it."""
        inside = {name.removeprefix(f"{prefix}."): name for name in self.infos if name.startswith(f"{prefix}.")}
        beside = {f"{name.partition('.')[0]}." for name in self.infos.keys() - inside.values()}
        return replace(
            self,
            infos={new: self.infos[old] for new, old in inside.items()},
            places={new: self.places[old] for new, old in inside.items()},
            container=".".join(filter(None, (self.container, prefix))),
            left_out=(*sorted(beside), *self.left_out),
            notes=(*self.notes, f"the weights are those under the prefix {prefix!r}: {why}"),
        )


@contextmanager
def checksums(files: Iterable[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Yield a function that waits for the sha256 of files by name; they are computed while the block runs."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        sums = pool.submit(lambda: {path.name: _sha256(path, stop) for path in files})
        try:
            yield sums.result
        finally:
            stop.set()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (part := file.read(HASHED_AT_ONCE)):
            digest.update(part)
    return digest.hexdigest()


def open_checkpoint(source: str | Path, *, prefer: str = "", weights: str = "") -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: A weights file, a folder, or ``hf-hub:org/name[@revision]``.
        prefer: Beginning of the name of the weights file to take where a folder has several.
        weights: Which of several sets of weights: "ema", "raw", a key of the file or a prefix of names; by default the
            averaged ones if there are any.

    Raises:
        ConversionError: Nothing there, several checkpoints, a damaged file, or a pickle with code.
        HubError: No such repository, no permission, or no network.
    """
    name = ModelName.parse(source)
    called, path = name.given, Path(source)
    without_path = Path(os.path.abspath(path)).name  # a link in the Hub's cache leads to a file without a name
    if name.repo_id:
        folder, chosen = download_checkpoint(called, lambda names: choose(names, called, prefer), _weight_map)
        path, without_path = folder / chosen[0], f"{HUB_PREFIX}{name.repo_id}@{folder.name}"
    elif name.path and path.is_dir():
        with readable(called):
            path = path / choose([inner for inner in files_below(path) if (path / inner).is_file()], called, prefer)
    elif name.path and path.is_file():
        if path.suffix == ".json" and not path.name.endswith(INDEX):
            raise ConversionError(f"{called} holds no weights: give the folder, or the weights beside it.")
        if (total := SHARD.search(path.name)) and int(total[1]) > 1:
            raise ConversionError(f"{called} is one of {int(total[1])} shards: give their folder, with the index.")
    else:
        raise ConversionError(
            f"{called} is neither a file nor a folder; a repository of the Hub needs the prefix 'hf-hub:'."
        )
    shards = _shards(path) if path.name.endswith(INDEX) else {path: set()}
    readers: dict[str, Reader] = {}
    reader = Reader()
    for file, listed in shards.items():
        reader = _reader(file, weights)
        require_stored(file, reader.infos)
        missing = sorted(listed - reader.infos.keys())
        if missing:
            raise ConversionError(f"{file} is missing {len(missing)} tensors that the index lists, first {missing[0]}.")
        for tensor in reader.infos:
            if len(tensor) > MAX_NAME or not tensor.isprintable():
                raise ConversionError(
                    f"{file} names a tensor {tensor[:MAX_NAME]!r}: no format has names that are longer than {MAX_NAME} "
                    "characters or cannot be printed."
                )
            if tensor in readers:
                raise ConversionError(f"{called} holds {tensor} twice, in two files.")
            readers[tensor] = reader
    if len(readers) > MAX_TENSORS:
        raise ConversionError(f"{called} holds {len(readers)} tensors, more than the {MAX_TENSORS} that any ViT needs.")
    names = unwrapped(readers, called=called)
    checkpoint = Checkpoint(
        called=called,
        source=without_path,
        files=tuple(shards),
        infos={new: readers[old].infos[old] for new, old in names.items()},
        places={new: (readers[old], old) for new, old in names.items()},
        container=reader.container,
        left_out=(*reader.left_out, *sorted(readers.keys() - set(names.values()))),
        notes=tuple(choice_note(reader.container, reader.keys, weights)),
        metadata=reader.metadata,
        config=_json(path.with_name(CONFIG_FILE)),
        openclip_config=_json(path.with_name(OPENCLIP_CONFIG)),
        preprocessor=_json(path.with_name(PREPROCESSOR_FILE)),
    )
    if not weights or (weights != RAW and reader.container in fitting(reader.keys, weights)):
        return checkpoint
    averaged = is_averaged(reader.container) or COUNTER in readers
    prefix = prefix_of(names, weights, averaged=averaged, keys=reader.keys, called=called)
    return checkpoint.under(prefix, why="as asked for") if prefix else checkpoint


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor."""
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConversionError(f"{index} lists no shards under 'weight_map'.")
    for file in weight_map.values():
        if Path(file).name != file:  # a path that leads out of the folder
            raise ConversionError(f"{index} names the shard {file!r}, which is not beside it.")
    return weight_map


def _shards(index: Path) -> dict[Path, set[str]]:
    """The tensors that every shard should have."""
    shards: dict[Path, set[str]] = {}
    for name, file in _weight_map(index).items():
        path = index.parent / file
        if not path.is_file():
            raise ConversionError(f"{index} names the shard {file!r}, which is not beside it.")
        shards.setdefault(path, set()).add(name)
    return shards


def _reader(path: Path, weights: str) -> Reader:
    kind = kind_of_file(path)
    if kind == SAFETENSORS:
        return SafetensorsReader(path)
    if kind == TORCH_ARCHIVE and require_whole_archive(path):
        return TorchScriptReader(path)
    return PickleReader(path, weights=weights, zipped=kind == TORCH_ARCHIVE)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(read_small(path))
    except ValueError as error:
        raise ConversionError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object.")
    return content
