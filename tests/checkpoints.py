"""Checkpoints for tests of what is refused and what is opened."""

import json
import os
import zipfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitreg_hub import conversion

GOLDEN = Path(__file__).parent / "golden"
DINOV2 = dict(num_heads=2)

convert = partial(conversion.convert, license="unknown")
"""For sources that tell no license."""

OPENCLIP_CONFIG = {
    "model_cfg": json.loads((GOLDEN / "openclip_full_plain/meta.json").read_text())["constructor"],
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    """The weights of a recorded checkpoint, without containers."""
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        if (GOLDEN / case / name).exists():
            return load_file(GOLDEN / case / name)
    loaded = torch.load(GOLDEN / case / "checkpoint.pth", weights_only=True)
    return loaded.get("model", loaded)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def vit(depth: int = 2, dim: int = 32, rows: int = 17, **other: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors under the names that timm, DeiT and DINO share, without a head."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, rows, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        layers = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
        }
        layers |= {"norm1": (dim,), "norm2": (dim,)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return random_tensors(shapes | other)


def shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    """A folder with two shards and their index, as transformers writes them."""
    folder.mkdir()
    first, stem = list(tensors)[::2], "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for file, names in zip(files, (first, tensors.keys() - set(first)), strict=True):
        part = {name: tensors[name] for name in names}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    weight_map = {name: files[name not in first] for name in tensors}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def files_below(folder: Path) -> set[Path]:
    """Everything below a folder, but the Hub's cache."""
    return {path for path in folder.rglob("*") if folder / "cache" not in (path, *path.parents)}


class Payload:
    """Creates a file when it is unpickled by a reader that runs code."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def replaced(path: Path, new: Path, change) -> Path:
    """Copy a zip archive with other contents of its records."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, change(name, old.read(name)))
    return new


class Tree(nn.Module):
    """Modules that hold tensors by the names of a state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name in {name.partition(".")[0] for name in tensors}:
            inner = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == name}
            if "" not in inner:
                self.add_module(name, Tree(inner))
            elif inner[""].is_floating_point():
                self.register_parameter(name, nn.Parameter(inner[""]))
            else:
                self.register_buffer(name, inner[""])

    def forward(self) -> torch.Tensor:
        raise RuntimeError("the archive's code ran")


def openai_archive(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A TorchScript archive with the names, the types and the numbers of OpenAI's, and its tensors."""
    tensors = {name: t.half() for name, t in tensors_of("openclip_full_plain").items()}
    tensors |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(64)}
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(Tree(tensors)), path)
    return path, tensors
