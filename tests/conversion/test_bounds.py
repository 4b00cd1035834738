"""Small files that ask for much: `convert` and `ModelBundle.load` refuse each in bounded time and memory."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from bounds import within_bounds
from checkpoints import DINOV2, GOLDEN, openai_archive, replaced, tensors_of, vit
from golden_cases import bundle
from safetensors.torch import save_file

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, VitregError


@pytest.fixture
def bounded(refused):
    """Refuse within the bounds, in few words."""

    def refuse(source, **options) -> str:
        with within_bounds():
            says = refused(source, **options)
        assert len(says) < 4000
        return says

    return refuse


# Pickles


NESTED = b"K\x01K\x01\x86q\x01" + b"".join(b"h" + bytes([k]) * 1 + b"h" + bytes([k]) + b"\x86q" + bytes([k + 1])
                                            for k in range(1, 40))  # fmt: skip
"""Makes a tuple that holds another twice, which holds another twice, 40 deep."""
AS_KEY = b"\x80\x02}" + NESTED + b"K\x01s."


def modules(depth: int) -> bytes:
    """A module that holds another twice, which holds another twice, as deep as asked for."""
    text = b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}b"
    for k in range(1, depth):
        text += b"h\x00)\x81q%c}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cub" % (k + 1, k, k)
    return text + b"."


def nested_shape() -> bytes:
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storageX\x0c\x00\x00\x00FloatStorageX\x01\x00\x00\x000"
    )
    tensor += b"X\x03\x00\x00\x00cpuK\x01tQK\x00" + NESTED + b"h\x01\x89}tR"
    return b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00w" + tensor + b"sb."


PICKLES = {"tuple as a key": AS_KEY, "modules": modules(31), "shape": nested_shape()}


@pytest.mark.parametrize("content", PICKLES)
def test_archives_with_many_paths(content, tmp_path, bounded):
    source, _ = openai_archive(tmp_path)
    changed = replaced(source, tmp_path / "changed.pt", lambda n, d: PICKLES[content] if n.endswith("data.pkl") else d)
    assert "more" in bounded(changed)


def test_a_tuple_of_many_paths_in_a_checkpoint(saved, tmp_path, bounded):
    changed = replaced(saved(vit()), tmp_path / "changed.pth", lambda n, d: AS_KEY if n.endswith("data.pkl") else d)
    assert "tuples 16 deep" in bounded(changed)


def test_archive_that_inflates(saved, tmp_path, bounded):
    source, bomb = saved(vit()), tmp_path / "bomb.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in old.namelist():
            archive.writestr(zipfile.ZipInfo(name), old.read(name))
        with archive.open(zipfile.ZipInfo("weights/code/bomb.py"), "w") as record:
            record._compress_type = zipfile.ZIP_DEFLATED
            for _ in range(10):
                record.write(bytes(16 * 2**20))
    assert "more than any ViT needs" in bounded(bomb)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["stride 0", "shared"])
def test_tensors_larger_than_their_file(kind, zipped, saved, bounded):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    if kind == "stride 0":
        tensors["norm.weight"] = torch.ones(1).expand(113_000, 113_000)
    else:
        large = torch.zeros(1000, 1000)
        tensors |= {f"blocks.{i}.attn.qkv.weight": large for i in range(3, 1000)}
    says = bounded(saved(tensors, _use_new_zipfile_serialization=zipped), **DINOV2)
    assert "bytes, but its tensors would take" in says


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_many_empty_tensors(kind, saved, bounded):
    tensors = {f"blocks.{i}.norm1.weight": torch.empty(0) for i in range(25_000)}
    name = "weights.safetensors" if kind == "safetensors" else "weights.pth"
    how = {"_use_new_zipfile_serialization": False} if kind == "legacy" else {}
    assert "any ViT needs" in bounded(saved(tensors, name, **how))


@pytest.mark.parametrize("format", ["auto", "timm"])
def test_thousands_of_blocks(format, saved, bounded):
    others = {name: torch.zeros(1) for i in range(800) for name in BLOCK.format(i).split()}
    tensors = others | vit(depth=1, **{"head.weight": (3, 32)})
    says = bounded(saved(tensors, "weights.safetensors"), format=format, num_heads=2)
    assert "has 800 blocks, more than any ViT" in says


BLOCK = " ".join(
    f"blocks.{{0}}.{layer}.{part}"
    for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for part in ("weight", "bias")
)


def test_names_of_many_parts(saved, bounded):
    assert "names that are longer" in bounded(saved({"module." * 100_000 + "x": torch.ones(2, 2)}))


def header(text: bytes, path: Path) -> Path:
    path.write_bytes(struct.pack("<Q", len(text)) + text + b" ")
    return path


def test_a_large_header(tmp_path, bounded):
    text = json.dumps({"__metadata__": {"format": "pt", "note": "x" * 17 * 2**20}}).encode()
    assert "more than any ViT needs" in bounded(header(text, tmp_path / "weights.safetensors"))
    folder = bundle("dinov2_vit_mlp_hub").save(tmp_path / "bundle")
    header(text, folder / "model.safetensors")
    with within_bounds(), pytest.raises(BundleError, match="more than any ViT needs"):
        ModelBundle.load(folder)


@pytest.mark.parametrize("name", ["weights.pth", "folder/model.safetensors", "folder/config.json"])
def test_a_pipe(name, tmp_path, bounded, saved):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    if name == "folder/config.json":
        save_file(vit(), tmp_path / "folder/model.safetensors")
    says = bounded(tmp_path / name.partition("/")[0])
    assert any(word in says for word in ("neither a file", "holds no weights", "is no file", "say which"))
    with pytest.raises(BundleError):
        ModelBundle.load(tmp_path / "folder")


def test_pickles_of_others_are_not_read(tmp_path, bounded):
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": {"cls_token": [0.0]}}))
    assert "a pickle that torch.save did not write" in bounded(tmp_path / "weights.pkl")


HUGE = {
    "layers": {"num_hidden_layers": 10**9},
    "width": {"hidden_size": 10**7},
    "both": {"num_hidden_layers": 500, "hidden_size": 32_000},
    "blocks": {"num_hidden_layers": 500},
    "image": {"image_size": 99_999},
    "MLP": {"intermediate_size": 10**6},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HUGE)
def test_a_config_of_transformers_that_asks_for_more_than_its_weights(what, tmp_path, bounded):
    folder = shutil.copytree(GOLDEN / "hf_vit" / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | HUGE[what]))
    bounded(folder, error=VitregError, verify=True)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "args",
    [{"depth": 10**9}, {"depth": "x"}, {"embed_dim": 10**12}, {"embed_dim": 32_000, "depth": 100}, {"img_size": 10**5}],
)
def test_a_config_of_timm_that_asks_for_more_than_its_weights(args, saved, bounded):
    path = saved(vit(), "model/model.safetensors")
    path.with_name("config.json").write_text(
        json.dumps(
            {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2} | args}
        )
    )
    bounded(path.parent, error=VitregError, verify=True)
