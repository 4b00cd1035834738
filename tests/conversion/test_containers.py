"""Files, shards, folders, archives and repositories that `convert` opens, and damaged ones that it refuses."""

import argparse
import json
import shutil

import pytest
import torch
from checkpoints import DINOV2, GOLDEN, Payload, convert, openai_archive, replaced, shards, tensors_of
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import HubError


def test_shards_that_lack_or_lead_elsewhere(tmp_path, refused):
    folder = shards(tmp_path / "sharded", tensors_of("dinov2_vit_mlp_hub"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    outside = shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    for file in ("../outside.safetensors", str(outside), "..", "", "model-00003-of-00002.safetensors"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"norm.weight": file}}))
        assert f"names the shard {file!r}, which is not beside it" in refused(folder, **DINOV2)
    for weight_map in ({}, [], {"norm.weight": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "lists no shards" in refused(folder, **DINOV2)
    index.write_text("{")
    assert "is not JSON" in refused(folder, **DINOV2)
    index.write_text(
        json.dumps({"weight_map": content["weight_map"] | {"lacking": "model-00001-of-00002.safetensors"}})
    )
    assert "is missing 1 tensors that the index lists, first lacking" in refused(folder, **DINOV2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "which is not beside it" in refused(folder, **DINOV2)


def test_same_tensor_twice(tmp_path, saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    folder = shards(tmp_path / "sharded", tensors)
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    assert "twice, in two files" in refused(folder, **DINOV2)
    both = tensors | {"_fsdp_wrapped_module.norm.weight": torch.ones(32)}
    assert "a tensor twice" in refused(saved(both), **DINOV2)


def test_folders_without_one_checkpoint(tmp_path, saved, refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no weights" in refused(folder)
    for name in ("folder/a.pth", "folder/b.pth"):
        saved(tensors_of("deit_base"), name)
    assert "holds 2 checkpoints (a.pth, b.pth): name one of the files" in refused(folder)
    assert "neither a file nor a folder" in refused(tmp_path / "nothing.pth")


# Containers


@pytest.fixture(scope="module")
def dinov2():
    """Weights, and the bundle that they make."""
    tensors = tensors_of("dinov2_vit_mlp_hub")
    return tensors, convert(GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth", **DINOV2)


def assert_same(bundle: ModelBundle, wanted: ModelBundle) -> None:
    assert bundle.state_dict.keys() == wanted.state_dict.keys()
    for name, tensor in wanted.state_dict.items():
        assert torch.equal(bundle.state_dict[name], tensor), name


CONTAINERS = {
    "flat": lambda t: t,
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "name": "run"},
    "model": lambda t: {"model": t, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}, "epoch": 3},
    "student and teacher": lambda t: {"student": {n: x + 1 for n, x in t.items()}, "teacher": t},
    "whole run": lambda t: {
        **{f"teacher.backbone.{n}": x for n, x in t.items()},
        **{f"student.backbone.{n}": x + 1 for n, x in t.items()},
        "teacher.dino_head.mlp.0.weight": torch.ones(4, 32),
        "dino_loss.center": torch.ones(1, 4),
    },
    "nested": lambda t: {"model": {"state_dict": t}, "loss": torch.ones(1)},
    "module": lambda t: {f"module.{n}": x for n, x in t.items()},
    "module of compiled": lambda t: {f"module._orig_mod.{n}": x for n, x in t.items()},
    "compiled module": lambda t: {f"_orig_mod.module.{n}": x for n, x in t.items()},
    "fsdp": lambda t: {n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): x for n, x in t.items()},
    "parameters": lambda t: {n: nn.Parameter(x) for n, x in t.items()},
    "views": lambda t: {n: x.repeat(*[1] * (x.ndim - 1), 2)[..., : x.shape[-1]] for n, x in t.items()},
    "float64": lambda t: {n: x.double() for n, x in t.items()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container, zipped, dinov2, saved, tmp_path):
    tensors, wanted = dinov2
    source = saved(CONTAINERS[container](tensors), _use_new_zipfile_serialization=zipped)
    assert_same(convert(source, tmp_path / "out", **DINOV2), wanted)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, dinov2, tmp_path):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors, suffix)
    for source in (folder, next(folder.glob("*.index.json"))):
        assert_same(convert(source, **DINOV2), wanted)


def test_folder_prefers_safetensors(dinov2, tmp_path, saved):
    tensors, wanted = dinov2
    saved({name: t + 1 for name, t in tensors.items()}, "folder/pytorch_model.bin")
    saved(Payload(tmp_path / "was here"), "folder/optimizer.pt")
    saved(tensors, "folder/model.safetensors")
    assert_same(convert(tmp_path / "folder", **DINOV2), wanted)


# OpenAI's archive


def test_openai_archive_without_its_code(tmp_path, monkeypatch):
    source, tensors = openai_archive(tmp_path)
    loaded = torch.jit.load(source).state_dict()
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was used"))
    nonsense = replaced(source, tmp_path / "code.pt", lambda name, data: b"no code (" if "/code/" in name else data)
    bundles = [convert(path, num_heads=4) for path in (source, nonsense)]
    for bundle in bundles:
        assert bundle.arch == "vit_base_reg0_clip_quickgelu"
        assert bundle.provenance.conversion.format == "openai"
        half = {name: t for name, t in tensors.items() if t.is_floating_point()}
        save_file(half, tmp_path / "half.safetensors")
        assert_same(bundle, convert(tmp_path / "half.safetensors", format="openai", num_heads=4))
    for name, tensor in loaded.items():
        if name.startswith("visual.transformer.resblocks.0.mlp.c_fc"):
            ours = bundles[0].state_dict[name.replace("visual.transformer.resblocks", "blocks").replace("c_fc", "fc1")]
            assert torch.equal(ours, tensor.float())


def test_every_tensor_of_an_archive(tmp_path):
    from vitreg_hub.conversion.checkpoint.opening import open_checkpoint

    source, tensors = openai_archive(tmp_path)
    checkpoint = open_checkpoint(source)
    assert checkpoint.container == "torchscript"
    assert checkpoint.infos.keys() == tensors.keys()
    for name, tensor in torch.jit.load(source).state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor.float()), name


# The Hub


def put(hub, repo: str, files: dict[str, bytes]) -> None:
    """Publish files with the real client."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.create_commit(repo, [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="files")


def test_hub_prefers_safetensors_and_works_offline(hub, dinov2, saved, tmp_path, monkeypatch):
    tensors, wanted = dinov2
    other = saved({name: t + 1 for name, t in tensors.items()}, "pytorch_model.bin").read_bytes()
    files = {"model.safetensors": saved(tensors, "model.safetensors").read_bytes(), "pytorch_model.bin": other}
    put(hub, "lab/both", files)
    assert_same(convert("hf-hub:lab/both", tmp_path / "first", **DINOV2), wanted)
    assert not any("pytorch_model.bin" in str(request) for request in hub.requests if "/resolve/" in str(request))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline = convert("hf-hub:lab/both", **DINOV2)
    assert_same(offline, wanted)
    commit = hub.repos["lab/both"].branches["main"]
    assert offline.provenance.conversion.source == f"hf-hub:lab/both@{commit}"
    assert len(hub.requests) == requests


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hub_with_shards(suffix, hub, dinov2, tmp_path):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors, suffix)
    put(hub, "lab/sharded", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert_same(convert("hf-hub:lab/sharded", **DINOV2), wanted)


def test_hub_with_a_pickle_alone_and_a_config(hub, tmp_path, saved):
    model = GOLDEN / "hf_vit/model"
    pickled = saved(load_file(model / "model.safetensors"), "pytorch_model.bin").read_bytes()
    put(hub, "lab/pickle", {"pytorch_model.bin": pickled, "config.json": (model / "config.json").read_bytes()})
    assert_same(convert("hf-hub:lab/pickle"), convert(model))


def test_hub_without_what_is_asked_for(hub, saved, refused):
    assert "no repository lab/nothing" in refused("hf-hub:lab/nothing", HubError)
    put(hub, "lab/empty", {"notes.txt": b"nothing"})
    assert "hf-hub:lab/empty holds no weights" in refused("hf-hub:lab/empty")
    assert "no such branch" in refused("hf-hub:lab/empty@elsewhere", HubError)


@pytest.mark.parametrize(
    "text", ['{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}', "{", "[]", '{"weight_map": []}']
)
def test_hub_with_a_damaged_index(text, hub, refused):
    put(hub, "lab/index", {"model.safetensors.index.json": text.encode()})
    refused("hf-hub:lab/index")
