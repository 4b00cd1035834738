"""Opening checkpoints: files, shards, folders and repositories, without reading what is not asked for."""

import hashlib
import json
import mmap
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitreg_hub.conversion.checkpoint.readers import (
    PickleReader,
    Reader,
    SafetensorsReader,
    TensorInfo,
    require_whole_archive,
)
from vitreg_hub.conversion.checkpoint.torchscript import TorchScriptReader
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CONFIG_FILE, OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, PREPROCESSOR_FILE, WEIGHTS_FILE
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.remote.download import download_checkpoint

WEIGHT_NAMES = (
    WEIGHTS_FILE,
    "model.safetensors.index.json",
    OPENCLIP_WEIGHTS,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""What a folder's weights are called, best first."""

HASHED_AT_ONCE = 16 * 2**20
"""Bytes; with few of them, a thread that hashes waits for the interpreter more than it works."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pyth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        called: As the user named it.
        source: The repository with its commit, or the name of the file or folder, for the folders of a machine are
            nobody's business.
        files: Weights files.
        infos: Shape and type of every tensor, by name without what wrappers such as DDP add.
        names: Name in the file, by name.
        readers: The open file that has a tensor, by name.
        container: Key of the dictionary that held the weights, "torchscript" for an archive.
        left_out: What a file holds beside the weights.
        metadata: Texts by name in the header of a .safetensors file.
        config: config.json beside the weights, empty without one.
        openclip_config: open_clip_config.json beside the weights, empty without one.
        preprocessor: preprocessor_config.json beside the weights, empty without one.
    """

    called: str
    source: str
    files: tuple[Path, ...]
    infos: Mapping[str, TensorInfo]
    names: Mapping[str, str] = field(repr=False)
    readers: Mapping[str, Reader] = field(repr=False)
    container: str
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
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
            ConversionError: It holds float64 numbers that float32 has not.
        """
        tensor = self.readers[name].read(self.names[name]).detach()
        exact = tensor.to(torch.float32)
        if tensor.dtype == torch.float64 and not torch.equal(exact.double().nan_to_num(), tensor.nan_to_num()):
            raise ConversionError(
                f"{self.called}: {name} holds float64 numbers that float32 has not; round them first."
            )
        return exact


@contextmanager
def checksums(files: Iterable[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Compute the sha256 of files in the background, as long as the block runs.

    Yields:
        A function that waits for the checksums and gives them by file name.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        sums = pool.submit(lambda: {path.name: _sha256(path, stop) for path in files})
        try:
            yield sums.result
        finally:
            stop.set()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, HASHED_AT_ONCE):
            if stop.is_set():
                break
            length = min(HASHED_AT_ONCE, size - start)
            with mmap.mmap(file.fileno(), length, offset=start, access=mmap.ACCESS_READ) as part:
                digest.update(part)
    return digest.hexdigest()


def open_checkpoint(source: str | Path, *, prefer: str = "") -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        source: A weights file, a folder, or ``hf-hub:org/name[@revision]``.
        prefer: Beginning of the name of the weights file to take where a folder has several.

    Raises:
        ConversionError: Nothing there, several checkpoints, a damaged file, or a pickle with code.
        HubError: No such repository, no permission, or no network.
    """
    name = ModelName.parse(source)
    called, named = name.given, Path(source).resolve().name
    if name.repo_id:
        folder, names = download_checkpoint(called, lambda names: _choose(names, called, prefer), _weight_map)
        files, named = [folder / name for name in names], f"{HUB_PREFIX}{name.repo_id}@{folder.name}"
    elif name.path and name.path.is_dir():
        names = [path.name for path in Path(source).iterdir() if path.is_file()]
        files = [Path(source) / _choose(names, called, prefer)]
    elif name.path and name.path.is_file():
        files = [Path(source)]
        if files[0].suffix == ".json" and not files[0].name.endswith(".index.json"):
            raise ConversionError(f"{called} holds no weights: give the folder, or the weights beside it.")
    else:
        raise ConversionError(
            f"{called} is neither a file nor a folder; a repository of the Hub needs the prefix 'hf-hub:'."
        )
    shards = _shards(files[0]) if files[0].name.endswith(".index.json") else {files[0]: None}
    readers, infos, container, left_out, metadata = {}, {}, "", (), {}
    for path, listed in shards.items():
        reader = _reader(path)
        container, left_out = getattr(reader, "container", ""), getattr(reader, "left_out", ())
        metadata = getattr(reader, "metadata", {})
        if listed is not None and (lacking := sorted(listed - reader.infos.keys())):
            raise ConversionError(f"{path} lacks {len(lacking)} tensors that the index lists, first {lacking[0]}.")
        for name, info in reader.infos.items():
            if not name.isprintable():
                raise ConversionError(f"{path} names a tensor {name!r}: no format has names that cannot be printed.")
            if name in infos:
                raise ConversionError(f"{called} holds {name} twice, in two files.")
            infos[name], readers[name] = info, reader
    names = _unwrapped(infos)
    beside = files[0].parent
    return Checkpoint(
        called=called,
        source=named,
        files=tuple(shards),
        infos={new: infos[old] for new, old in names.items()},
        names=names,
        readers={new: readers[old] for new, old in names.items()},
        container=container,
        left_out=left_out,
        metadata=metadata,
        config=_json(beside / CONFIG_FILE),
        openclip_config=_json(beside / OPENCLIP_CONFIG),
        preprocessor=_json(beside / PREPROCESSOR_FILE),
    )


def _choose(names: Iterable[str], called: str, prefer: str) -> str:
    names = set(names)
    usual = [name for name in WEIGHT_NAMES if name in names]
    if found := sorted(usual, key=lambda name: not (prefer and name.startswith(prefer))):
        return found[0]
    others = sorted(name for name in names if name.endswith(SUFFIXES) and "/" not in name)
    if len(others) == 1:
        return others[0]
    if others:
        raise ConversionError(
            f"{called} holds {len(others)} checkpoints ({', '.join(others[:5])}): name one of the files."
        )
    raise ConversionError(f"{called} holds no weights: looked for {', '.join('*' + s for s in SUFFIXES)}.")


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor."""
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConversionError(f"{index} lists no shards under 'weight_map'.")
    for file in weight_map.values():
        if Path(file).name != file:  # a path that leads out of the folder
            raise ConversionError(f"{index} names the shard {file!r}, which is not beside it.")
    return weight_map


def _shards(index: Path) -> dict[Path, set[str] | None]:
    shards: dict[Path, set[str] | None] = {}
    for name, file in _weight_map(index).items():
        path = index.parent / file
        if not path.is_file():
            raise ConversionError(f"{index} names the shard {file!r}, which is not beside it.")
        shards.setdefault(path, set()).add(name)
    return shards


def _reader(path: Path) -> Reader:
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if zipfile.is_zipfile(path):
        require_whole_archive(path)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return TorchScriptReader(path)
    return PickleReader(path)


def _unwrapped(infos: Mapping[str, object]) -> dict[str, str]:
    """Names without what DDP, torch.compile and FSDP put before or into them, and the names in the file."""
    names = {name.replace("_fsdp_wrapped_module.", ""): name for name in infos}
    if len(names) < len(infos):
        raise ConversionError("the checkpoint holds a tensor twice, with and without FSDP's '_fsdp_wrapped_module.'.")
    while wrapper := next((w for w in ("module.", "_orig_mod.") if all(n.startswith(w) for n in names)), None):
        names = {new.removeprefix(wrapper): old for new, old in names.items()}
        if not names:
            break
    return names


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object.")
    return content
