"""Rows that are packed into files, parquet or WebDataset shards: which files a name means, and opening them safely."""

import json
import os
import pickle
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from vitreg_hub.errors import DataError
from vitreg_hub.images.data_sets import SPLIT_FOLDERS, Rows

READERS = {".tar": "webdataset", ".parquet": "parquet"}
"""Builders of `datasets` by the ending of the files."""

MOST_FILES = 100_000
"""Of one name with braces."""

UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ImportError)
UNREADABLE += (ArithmeticError, MemoryError, struct.error, zlib.error, pickle.UnpicklingError, tarfile.TarError)
UNREADABLE += (DatasetsError,)
"""What `datasets` raises, even in the middle of a stream, for files that are broken, of another kind or out of reach:
it decodes all members of an archive, also those that nobody asks for."""

INFLATED, PER_BYTE = 2**29, 100
"""Bytes that a group of rows of parquet may have unpacked, and from then on for each byte of the file: pictures are
packed already."""


def packed_files(name: str) -> list[str]:
    """Shards or parquet files of a path, pattern or folder; empty if it is something else."""
    if os.path.isdir(name):
        files = []
        for ending in READERS:
            files = files or sorted(str(file) for file in Path(name).glob(f"*{ending}"))
        splits = sorted({re.split(r"[-_.\d]", Path(file).name)[0] for file in files} & SPLIT_FOLDERS)
        if len(splits) > 1:
            pattern = Path(name) / f"{splits[-1]}*{_ending(files[0])}"
            raise DataError(f"{name} holds the splits {', '.join(splits)}: give the files of one, such as {pattern}.")
        return files
    if _ending(name) not in READERS:
        return []
    paths = list(islice(_braces(name), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise DataError(f"{name} stands for more than {MOST_FILES:,} files: give fewer.")
    return [file for path in dict.fromkeys(paths) for file in _matches(path, name)]


def open_packed(name: str, files: list[str], streaming: bool) -> Rows:
    reader = READERS[_ending(files[0])]
    for file in files:
        if "://" not in file:
            _require_sound(name, file, reader)
    streaming = streaming or reader == "webdataset" or any("://" in file for file in files)
    try:
        return datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as {reader}: {reason(error)}.") from error


def require_whole_keys(called: str, columns: Iterable[str]) -> None:
    """Refuse shards whose keys have dots: a key ends at its first one, so that several samples become one row.

    Raises:
        DataError: Two columns differ in their numbers alone, as those of `a.v1.jpg` and `a.v2.jpg` do.
    """
    known: dict[str, str] = {}
    for column in columns:
        first = known.setdefault(re.sub(r"\d+", "0", column), column)
        if first != column:
            raise DataError(
                f"{called} has the columns {first} and {column}: in shards a key ends at its first dot, so name "
                "the files without other dots than that before the ending."
            )


def common_folder(files: Sequence[str]) -> str:
    """The folder that all files share, or the start of the first URL."""
    if all("://" not in file for file in files):
        return os.path.commonpath([os.path.dirname(file) for file in files])
    return files[0].rpartition("/")[0] + "/"


def _require_sound(name: str, file: str, reader: str) -> None:
    """Refuse a local file that would block, or whose footer asks for far more memory than its size explains."""
    if not Path(file).is_file():
        raise DataError(f"{file} is not an ordinary file: give files, or their folder.")
    if reader != "parquet":
        return
    try:
        footer = pyarrow.parquet.read_metadata(file)
        features = list(_objects(json.loads((footer.metadata or {}).get(b"huggingface", b"{}"))))
    except UNREADABLE as error:
        raise DataError(f"{name} cannot be read as parquet: {reason(error)}.") from error
    size = Path(file).stat().st_size
    largest = max((footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0)
    if footer.num_rows > size or largest > max(INFLATED, PER_BYTE * size):
        raise DataError(
            f"{file} says that its {size:,} bytes hold {footer.num_rows:,} rows, of up to {largest:,} bytes together: "
            "it is damaged, or made to fill the memory."
        )
    if any(f.get("_type") == "ClassLabel" and not isinstance(f.get("names"), list) for f in features):
        raise DataError(f"{file} has class labels without their names: store the names in its column.")


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """Every object in JSON, at any depth."""
    if isinstance(content, dict):
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _objects(inner)


def reason(error: BaseException) -> str:
    """First line of an error's text, without the full stop."""
    return (str(error).partition("\n")[0] or type(error).__name__).rstrip(".")


def _ending(name: str) -> str:
    return Path(urlsplit(name).path if "://" in name else name).suffix


def _matches(path: str, name: str) -> list[str]:
    if "://" in path:
        if "*" in path:
            raise DataError(
                f"{name} is a URL, whose files cannot be listed: count them, as in train-{{0000..0099}}.tar."
            )
        return [path]
    files = [path] if os.path.exists(path) else sorted(glob(path, recursive=True))
    if not files:
        raise DataError(f"there is no file {path}" + (f", which {name} asks for." if path != name else "."))
    return [str(Path(file).absolute()) for file in files]


def _braces(pattern: str) -> Iterator[str]:
    """Yield all names of a pattern with ``{first..last}`` or ``{one,other}``, as in a shell."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not match:
        yield pattern
        return
    first, last, several = match.groups()
    if not several and max(len(first), len(last)) > 18:
        raise DataError(f"{pattern} stands for more than {MOST_FILES:,} files: give fewer.")
    if not several and int(first) > int(last):
        raise DataError(f"{pattern} counts from {first} to {last}: give the smaller number first.")
    inner = several.split(",") if several else (f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1))
    for part in inner:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])
