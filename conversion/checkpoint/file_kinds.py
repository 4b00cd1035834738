"""What a file or folder is that somebody takes for a checkpoint, told by its content, and what to do with it."""

import os
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from vitreg_hub.errors import ConversionError
from vitreg_hub.files import OPENCLIP_WEIGHTS, WEIGHTS_FILE

INDEX = ".index.json"
WEIGHT_NAMES = (
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}{INDEX}",
    OPENCLIP_WEIGHTS,
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "open_clip_pytorch_model.bin",
)
"""What a folder's weights are called, best first."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pyth", ".pth.tar", ".pt.tar")
SHARD = re.compile(r"-\d{1,9}-of-(\d{1,9})\.")
"""In the names of files that are parts of one checkpoint."""
BEST_NAMES = ("best", "last", "final", "latest")
"""Parts of the names of files that are named first where a folder holds many."""
SHOWN = 8
"""How many files a message names."""
LEVELS, LOOKED_AT = 3, 1000
"""How many folders deep, and how many files, a folder is searched for what to name in a message."""

HEAD = 512
"""Bytes at the beginning of a file that tell its kind."""
TORCH_ARCHIVE, TORCH_PICKLE, SAFETENSORS = "zip", "pickle", "safetensors"
TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""The number at the beginning of what torch.save wrote before version 1.6, as a pickle."""

SAME_REPOSITORY = "take model.safetensors or pytorch_model.bin of the same repository, or save a state_dict with torch"
UNPACK = "unpack it, and give the checkpoint inside"
MAGICS = (
    (rb"version https://git-lfs\.github\.com/spec|version https://hawser", "a Git LFS pointer", "run `git lfs pull`"),
    (rb"/annex/objects/|\.\./.*annex/objects", "a git-annex pointer", "run `git annex get`"),
    (rb"(?i)\s*<(!doctype|html|head|\?xml|error|body)", "a web page, not a download",
     "get the file itself (on the Hub: /resolve/ in place of /blob/, and a token where it is asked for)"),
    (rb"\s*[{\[]\s*[\"{\[\]}]", "JSON text, not weights", "give the weights that it belongs to, or get the file again"),
    (rb"\x89HDF\r\n", "HDF5 (.h5), of Keras", SAME_REPOSITORY),
    (rb"[\x81-\x8f\xde\xdf].{0,4}?[\xa1-\xbf\xd9-\xdb]", "MessagePack (.msgpack), of Flax", SAME_REPOSITORY),
    (rb"\x93NUMPY", "one numpy array (.npy)", "save a state_dict with torch"),
    (rb"GGUF", "GGUF, of llama.cpp", SAME_REPOSITORY),
    (rb"\x1f\x8b", "a gzip archive", UNPACK),
    (rb"BZh\d", "a bzip2 archive", UNPACK),
    (rb"\xfd7zXZ", "an xz archive", UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (rb"7z\xbc\xaf|Rar!", "a 7z or rar archive", UNPACK),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture", "give a file of weights"),
    (rb"%PDF", "a PDF", "give a file of weights"),
)  # fmt: skip
"""How files of other kinds begin, what they are, and what to do."""


def kind_of_file(path: Path) -> str:
    """Whether a file is of safetensors or of either kind of torch.save, whatever its name is.

    Raises:
        ConversionError: It is something else, and what; or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head, size = file.read(HEAD), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not head:
        raise ConversionError(f"{path} is empty: get it again.")
    if path.suffix == ".distcp":
        raise _other(path, "a part of a distributed checkpoint (DCP)", f"give its folder, {path.parent}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return SAFETENSORS
    if (is_zip := head.startswith(b"PK") and zipfile.is_zipfile(path)) or TORCH_MAGIC in head[:32]:
        if path.suffix == ".safetensors":  # torch.load goes by that
            raise _other(path, "a file of torch.save, in spite of its name", "rename it to end in .pth")
        return TORCH_ARCHIVE if is_zip else TORCH_PICKLE
    if re.match(rb"\x80[\x02-\x05]", head) and not TORCH_MAGIC.startswith(head[2:14]):
        raise _other(path, "a pickle that torch.save did not write", "load it and save a state_dict with torch")
    for begin, what, remedy in MAGICS:
        if re.match(begin, head, re.DOTALL):
            raise _other(path, what, remedy)
    if head[257:262] == b"ustar":
        raise _other(path, f"a tar archive{_holding(_names_in_tar(path))}", UNPACK)
    if size < 2**20 and re.fullmatch(r"[\x20-\x7e\s]{9,}", head.decode("latin-1")):
        raise _other(path, f"text that begins with {head[:40].decode()!r}", "give a file of weights")
    return SAFETENSORS if path.suffix == ".safetensors" else TORCH_PICKLE


def refuse_other_archive(path: Path, names: Collection[str]) -> None:
    """Refuse a zip archive that torch.save did not write, told by the names of what is in it.

    Raises:
        ConversionError: It is something else, and what.
    """
    if any(f"/{name}".endswith("/data.pkl") for name in names):
        return
    if names and all(name.endswith(".npy") for name in names):
        remedy = (
            "timm reads those of big_vision (`model.load_pretrained(FILE)`): save that model's state_dict with torch"
        )
        raise _other(path, "a numpy archive (.npz), as JAX's ViTs are saved", remedy)
    raise _other(path, f"a zip archive{_holding(names)}", UNPACK)


def _other(path: Path, what: str, remedy: str) -> ConversionError:
    return ConversionError(f"{path} is {what}: {remedy}.")


def _names_in_tar(path: Path) -> list[str]:
    try:
        with tarfile.open(path, "r:") as archive:
            return [member.name for member in islice(archive, LOOKED_AT)]
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return []


def _holding(names: Iterable[str]) -> str:
    """What of an archive is worth naming."""
    inside = list(names)
    best = _best_first(name for name in inside if name.endswith(SUFFIXES)) or inside
    return f" that holds {_listed(best)}" if best else ""


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in list(names)[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _best_first(names: Iterable[str]) -> list[str]:
    """Checkpoints in the order in which they are worth naming: the best, the last, then the others, newest first."""

    def rank(name: str) -> tuple[int, list[int], str]:
        known = (k for k, word in enumerate(BEST_NAMES) if word in PurePosixPath(name).name.lower())
        return next(known, len(BEST_NAMES)), [-int(number[:9]) for number in re.findall(r"\d+", name)], name

    return sorted(names, key=rank)


def files_below(folder: Path) -> list[str]:
    """Some files in a folder and in those inside, by their paths in it; links to folders are not followed."""

    def walk() -> Iterator[str]:
        for root, folders, files in os.walk(folder):
            inside = Path(root).relative_to(folder)
            if len(inside.parts) >= LEVELS:
                folders.clear()
            yield from ((inside / name).as_posix() for name in sorted(files))

    return list(islice(walk(), LOOKED_AT))


def choose(names: Iterable[str], called: str, prefer: str) -> str:
    """The weights of a folder or repository, or the index of their shards.

    Args:
        names: Its files, by their paths in it.
        prefer: Beginning of the name of the file to take where there are several usual ones.

    Raises:
        ConversionError: There are none, or several; or it is the folder of something else, and what to do with it.
    """
    names = set(names)
    if usual := [name for name in WEIGHT_NAMES if name in names]:
        return min(usual, key=lambda name: not name.startswith(prefer))
    here = [name for name in names if "/" not in name]
    others = [name for name in here if name.endswith((*SUFFIXES, *(f"{suffix}{INDEX}" for suffix in SUFFIXES)))]
    if any(name.endswith(INDEX) for name in others):
        others = [name for name in others if not SHARD.search(name)]
    if len(others) == 1:
        return others[0]
    if what := _run_of(names, called):
        raise ConversionError(f"{called} is {what}, and convert what that writes.")
    if others:
        listed = _listed(_best_first(others))
        raise ConversionError(f"{called} holds {len(others)} checkpoints ({listed}): name one of the files.")
    if deeper := _best_first(name for name in names if name.endswith(SUFFIXES)):
        raise ConversionError(f"{called} itself holds no weights, but folders in it do: give {_listed(deeper)}.")
    for name in sorted(here):
        if name.endswith((".msgpack", ".h5", ".npz", ".keras", ".onnx", ".gguf", ".pb", ".zip", ".tar", ".gz", ".pkl")):
            raise ConversionError(f"{called} holds no weights of torch, only {name}: {SAME_REPOSITORY}.")
    raise ConversionError(f"{called} holds no weights: looked for {', '.join('*' + s for s in SUFFIXES)}.")


def _run_of(names: Collection[str], called: str) -> str:
    """What writes a folder whose parts must be merged, and how; "" for any other."""
    parts = [PurePosixPath(name) for name in names]
    if any(part.name.endswith(("_model_states.pt", "_optim_states.pt")) for part in parts):
        return f"a run of DeepSpeed: merge it with `python -m deepspeed.utils.zero_to_fp32 {called} OUT`"
    if apart := {part.parent.as_posix() for part in parts if part.suffix == ".distcp"}:
        folder = PurePosixPath(called, min(apart, key=lambda inside: ("optim" in inside, inside)))
        return (
            "a distributed checkpoint of torch (DCP, as FSDP writes it): merge it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pth`"
        )
    ranks = {found[1] for part in parts if (found := re.search(r"(?:^|[._-])rank[._-]?(\d+)", part.name))}
    if len(ranks) > 1:
        return "a run of several ranks, a part of the weights in each file: merge the ranks into one state_dict"
    return ""
