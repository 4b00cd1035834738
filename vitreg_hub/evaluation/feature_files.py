"""Features of any number of images, in files of one size: written one after the other, and resumed where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, islice
from math import prod
from pathlib import Path
from typing import Literal, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.opened import Opened, Options
from vitreg_hub.files import read_content, whole_file
from vitreg_hub.images.source import Images, ImageSource, open_images
from vitreg_hub.passes import Needs, failing_together, gathered, in_order, observed
from vitreg_hub.tokens import Observation
from vitreg_hub.typed import parsed, read

INDEX_FILE = "index.json"
SHARD_BYTES = 2**28
"""Of the features in one file, at most, unless a single image has more."""
MOST_IMAGES = 2**14
"""In one file: what is lost at most when a run is killed."""

Kind = Literal["class", "registers", "patches-mean", "dense"]
"""The class token [D], all registers [R, D], the mean of the patches [D], or all patches [rows, columns, D]."""
NumberType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSettings:
    """All that decides about features.

    Attributes:
        model: As it was given.
        preprocessing: In words.
        images: Name of the source.
        num_images: In the source; None for a stream.
        kind: Which tokens they are, after the final norm.
        dtype: In which they are stored.
        shape: Of one image's features.
        shard_size: Images in each file but the last.
        weights: Hash of the network's weights.
        class_names: Of the labels, where they are known.
    """

    model: str
    preprocessing: str
    images: str
    num_images: int | None
    kind: Kind
    dtype: NumberType
    shape: tuple[int, ...]
    shard_size: int
    weights: str
    class_names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file that is complete.

    Attributes:
        file: Its name in the folder.
        images: Files of its images, below the source's folder if it is one; empty for one that is in no file.
    """

    file: str
    images: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureIndex:
    """What a folder of features holds; the content of its index.json.

    Attributes:
        settings: The features'.
        shards: Those that are complete, in the order of their images.
        complete: Whether these are all.
    """

    settings: FeatureSettings
    shards: tuple[Shard, ...] = ()
    complete: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeatures:
    """Features of N images, read from their files.

    Attributes:
        index: Of their folder.
        features: [N, *] as `Kind` tells.
        indices: [N] int64, of the images in their source.
        labels: [N] int64, -1 where one is missing; None without labels.
        images: [N] files of the images, as of `Shard`.
    """

    index: FeatureIndex
    features: Tensor
    indices: Tensor
    labels: Tensor | None
    images: tuple[str, ...]


def write_features(
    model: nn.Module | str | Path,
    images: Images,
    out: str | Path,
    *,
    kind: Kind = "class",
    store: NumberType = "float32",
    shard_size: int | None = None,
    **options: Unpack[Options],
) -> FeatureIndex:
    """Write features of images into a folder of .safetensors files with an index.json.

    Only one file's features are in memory. If the folder holds a part of the same features, which a run that was
    stopped left behind, the rest is added, and the files are those of a run that was not stopped, byte for byte. All
    processes must call it.

    Args:
        model: As `open_vit` takes it.
        images: As `open_images` takes them.
        out: The folder.
        kind: Which tokens.
        store: Number type in the files; the network computes in its own.
        shard_size: Images in each file, by default as many as `SHARD_BYTES` hold, `MOST_IMAGES` at most.
        **options: As of `Options`.

    Raises:
        DataError: The folder holds something else, an image cannot be read, or the model has no such tokens.
        BundleError: The folder cannot be written.
    """
    if shard_size is not None and shard_size < 1:
        raise DataError(f"shard_size is {shard_size}: give at least 1 image.")
    source = open_images(images, max_images=options.get("max_images"), seed=options.get("seed", 0))
    opened, folder = Opened.of(model, **options), Path(out)
    with failing_together(world_size=opened.processes.num_processes):
        settings = _settings(opened, source, kind, store, shard_size)
        index = _left_behind(folder, settings) or FeatureIndex(settings=settings)
    if opened.processes.is_main_process and not index.complete:
        for left in (*folder.glob(f".{INDEX_FILE}-*"), *folder.glob(".features-*")):  # by a process that was killed
            shutil.rmtree(left)
        _write_index(folder, index)
    for number, start, part in _parts(source, index):
        tensors, files = _tensors(opened, part, settings, start=start)
        if files:
            shard = Shard(file=f"features-{number:05}.safetensors", images=files)
            index = replace(index, shards=(*index.shards, shard))
            if opened.processes.is_main_process:
                with whole_file(folder / shard.file, replace=True) as new:
                    new.write_bytes(save(tensors))
        ended = len(files) < settings.shard_size or start + len(files) == source.num_images
        index = replace(index, complete=ended)
        if opened.processes.is_main_process:
            _write_index(folder, index)
        if ended:
            break
    return index


def load_features(folder: str | Path, *, shards: Sequence[int] | None = None) -> StoredFeatures:
    """Read features that `write_features` wrote.

    Args:
        folder: Where they are.
        shards: Numbers of the files to read, from 0; by default all are read, and must be there.

    Raises:
        DataError: There are none, they are incomplete, or a file cannot be read.
    """
    index = _read_index(Path(folder))
    if index is None:
        raise DataError(f"{folder} holds no {INDEX_FILE}: give a folder that `vitreg features` wrote.")
    if shards is None and not index.complete:
        raise DataError(
            f"the features in {folder} are incomplete ({len(index.shards)} files): run the same command again, or name "
            "the shards to be read."
        )
    numbers = range(len(index.shards)) if shards is None else shards
    if wrong := [number for number in numbers if not 0 <= number < len(index.shards)]:
        raise DataError(f"there is no shard {wrong[0]} in {folder}: it holds {len(index.shards)}, from 0.")
    if not numbers:
        raise DataError("there are no shards to be read: name at least one.")
    parts = []
    for number in numbers:
        file = Path(folder, index.shards[number].file)
        try:
            parts.append(load_file(file))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file} cannot be read ({error}): delete {folder} and write the features again."
            ) from error
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return StoredFeatures(
        index=index,
        features=columns["features"],
        indices=columns["indices"],
        labels=columns.get("labels"),
        images=tuple(image for number in numbers for image in index.shards[number].images),
    )


def _settings(
    opened: Opened, source: ImageSource, kind: Kind, store: NumberType, shard_size: int | None
) -> FeatureSettings:
    """The settings, with the shape of the first image's features."""
    first = next(
        observed(opened.model, source.at_most(1).batches(opened.vit.transform, batch_size=1), Needs(normed=True))
    )
    shape = tuple(_of_kind(first[0], kind).shape[1:])
    fitting = SHARD_BYTES // (prod(shape) * getattr(torch, store).itemsize)
    return FeatureSettings(
        model=opened.vit.name,
        weights=_fingerprint(opened.model),
        preprocessing=opened.vit.preprocessing,
        images=source.name,
        num_images=source.num_images,
        kind=kind,
        dtype=store,
        shape=shape,
        shard_size=shard_size or min(MOST_IMAGES, max(1, fitting)),
        class_names=source.label_names or (),
    )


def _of_kind(seen: Observation, kind: Kind) -> Tensor:
    tokens = seen.normed
    lacking = {"class": not tokens.cls.shape[1], "registers": not tokens.registers.shape[1]}
    if lacking.get(kind):
        rest = [other for other in ("class", "registers", "patches-mean", "dense") if not lacking.get(other)]
        raise DataError(f"the model has no {kind} tokens: choose {', '.join(rest[:-1])} or {rest[-1]} as kind.")
    match kind:
        case "class":
            return tokens.cls[:, 0]
        case "registers":
            return tokens.registers
        case "patches-mean":
            return tokens.patches.mean(dim=1)
        case "dense":
            return tokens.patches.unflatten(1, seen.order.grid)


def _parts(source: ImageSource, index: FeatureIndex) -> Iterator[tuple[int, int, ImageSource]]:
    """Yield number, first place and images of each file that is to be written; after a stream, empty ones."""
    if index.complete:
        return
    size, done = index.settings.shard_size, len(index.shards)
    stream = iter(source.rows.skip(done * size) if source.picked is None else ())
    for number in count(done):
        start = number * size
        if source.picked is None:
            yield number, start, replace(source, rows=islice(stream, size))
        else:
            picked = source.picked[start : start + size]
            yield number, start, replace(source, picked=picked, num_images=len(picked))


def _tensors(
    opened: Opened, part: ImageSource, settings: FeatureSettings, *, start: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What one file holds, and the files of its images, the same on every process; nothing where there are no more."""
    mine, files, world_size = [], {}, opened.processes.num_processes
    number = start // settings.shard_size
    with failing_together(world_size=world_size):
        for seen, batch in observed(opened.model, opened.batches(part, f"features, file {number}"), Needs(normed=True)):
            features = _of_kind(seen, settings.kind)
            if tuple(features.shape[1:]) != settings.shape:
                raise DataError(f"the images of {part.name} have several sizes after preprocessing: resize all to one.")
            indices = batch.indices + (start if part.picked is None else 0)  # those of a stream start anew
            labels = {} if batch.labels is None else {"labels": batch.labels}
            stored = features.to("cpu", getattr(torch, settings.dtype))
            mine.append({"features": stored, "indices": indices, **labels})
            places = batch.files or ("",) * len(indices)
            files |= {index: _below(file, part.name) for index, file in zip(indices.tolist(), places, strict=True)}
    shares = gathered((mine, files), world_size=world_size)
    named = {index: file for _, share in shares for index, file in share.items()}
    columns = in_order(batch for share, _ in shares for batch in share)
    return columns, tuple(named[index] for index in sorted(named))


def _below(file: str, folder: str) -> str:
    return Path(file).relative_to(folder).as_posix() if file and Path(file).is_relative_to(folder) else file


def _left_behind(folder: Path, settings: FeatureSettings) -> FeatureIndex | None:
    """What is already in a folder, if it holds a part of the same features."""
    index = _read_index(folder)
    if index is None:
        if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
            raise DataError(f"{folder} exists and holds no features: choose another folder.")
        return None
    for field in fields(settings):
        old, new = (getattr(given, field.name) for given in (index.settings, settings))
        if old != new:
            raise DataError(
                f"{folder} holds features of another {field.name.replace('_', ' ')} ({old}, not {new}): choose another "
                "folder or delete it."
            )
    if missing := [shard.file for shard in index.shards if not Path(folder, shard.file).is_file()]:
        raise DataError(f"{folder} lacks {missing[0]}, which its {INDEX_FILE} names: delete it and start again.")
    return index


def _read_index(folder: Path) -> FeatureIndex | None:
    content = read_content(folder / INDEX_FILE)
    called = str(folder / INDEX_FILE)
    return (
        None
        if content is None
        else read(FeatureIndex, parsed(content, error=DataError), called=called, error=DataError)
    )


def _write_index(folder: Path, index: FeatureIndex) -> None:
    with whole_file(folder / INDEX_FILE, replace=True) as new:
        new.write_text(json.dumps(asdict(index), indent=1) + "\n")


def _fingerprint(model: nn.Module) -> str:
    """Tells apart weights, and types of numbers, of networks that are called the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
