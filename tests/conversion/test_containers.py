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
from vitreg_hub.conversion.report import ConversionReport
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
    for name in (*(f"run/checkpoint-{i}.pth.tar" for i in range(20)), "run/last.pth.tar", "run/model_best.pth.tar"):
        saved({}, name)
    says = refused(tmp_path / "run")
    assert "(model_best.pth.tar, last.pth.tar, checkpoint-19.pth.tar, checkpoint-18.pth.tar," in says
    assert "and 14 more): name one of the files" in says
    assert "folders in it do: give" in refused(tmp_path)
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


def raw(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that were not averaged."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


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
    "averaged model": lambda t: {"n_averaged": torch.tensor(9)} | {f"module.{n}": x for n, x in t.items()},
    "module in a module": lambda t: {f"model.module.{n}": x for n, x in t.items()},
    "each block compiled": lambda t: {n.replace("blocks.1.", "blocks.1._orig_mod."): x for n, x in t.items()},
    "compiled in a module": lambda t: {f"model._orig_mod.{n}": x for n, x in t.items()},
    "checkpointed, compiled and in parallel": lambda t: {
        n.replace("blocks.1.", "blocks.1._orig_mod._checkpoint_wrapped_module.module."): x for n, x in t.items()
    },
    "a prefix that all have": lambda t: {f"encoder.{n}": x for n, x in t.items()},
    "another key": lambda t: {
        "model_state_dict": t,
        "optimizer_state_dict": {"state": {0: {"exp_avg": t["norm.bias"]}}},
    },
    "timm's run": lambda t: {"state_dict": raw(t), "state_dict_ema": t, "optimizer": {}, "arch": "vit"},
    "both averages that timm knows": lambda t: {"model_ema": raw(t), "state_dict_ema": t},
    "DeiT's run": lambda t: {"model": raw(t), "model_ema": t, "lr_scheduler": {}, "epoch": 3},
    "ema": lambda t: {"net": raw(t), "ema": t, "loss": torch.ones(1)},
    "target encoder": lambda t: {"encoder": raw(t), "target_encoder": {f"module.{n}": x for n, x in t.items()}},
    "averaged in the model": lambda t: {"model": {"weights": raw(t), "weights_swa": t}},
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


def test_an_averaged_model_alone_is_the_averaged_one(dinov2, saved, tmp_path, refused):
    tensors, wanted = dinov2
    source = saved(CONTAINERS["averaged model"](tensors))
    assert_same(convert(source, tmp_path / "ema", weights="ema", **DINOV2), wanted)
    assert "holds no raw weights" in refused(source, weights="raw")


@pytest.mark.parametrize("container", ["timm's run", "DeiT's run", "ema", "student and teacher"])
def test_a_choice_among_weights_is_told_and_can_be_changed(container, dinov2, saved):
    tensors, wanted = dinov2
    content = CONTAINERS[container](tensors)
    averaged, others = ("state_dict_ema", "model_ema", "ema", "teacher"), ("state_dict", "model", "net", "student")
    (key,), (other,) = content.keys() & set(averaged), content.keys() & set(others)
    many = {f"a{i}": i for i in range(30)}  # which would come first in an alphabet
    source = saved(many | content)
    (note, *_) = ConversionReport.of(convert(source, **DINOV2)).notes
    assert f"those under {key!r}, the averaged ones" in note
    assert f"not {other!r}: --weights KEY takes others" in note
    for asked in ("ema", key):
        assert_same(convert(source, weights=asked, **DINOV2), wanted)
    for asked in ("raw", other):
        chosen = convert(source, weights=asked, **DINOV2)
        assert torch.equal(chosen.state_dict["norm.weight"], content[other]["norm.weight"])
        assert f"under {other!r}" in ConversionReport.of(chosen).notes[0]


FLAT = {
    "two encoders": ("base_encoder.", "momentum_encoder.", {"predictor.0.weight": torch.ones(5, 5)}),
    "a model and its average": ("model.", "model_ema.module.", {"criterion.weight": torch.ones(5)}),
    "Meta's run": ("student.backbone.", "teacher.backbone.", {"dino_loss.center": torch.ones(1, 4)}),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", FLAT)
def test_weights_under_prefixes_can_be_chosen(case, suffix, dinov2, saved, refused):
    tensors, wanted = dinov2
    one, other, beside = FLAT[case]
    both = {f"{one}{n}": t + 1 for n, t in tensors.items()} | {f"{other}{n}": t for n, t in tensors.items()}
    source = saved(both | beside, f"weights.{suffix}")
    bare = other.removesuffix("module.").rstrip(".")
    for asked in ("ema", bare):
        chosen = convert(source, weights=asked, **DINOV2)
        assert torch.equal(chosen.state_dict["norm.weight"], wanted.state_dict["norm.weight"])
        assert any("not read: " in note and next(iter(beside)).partition(".")[0] in note for note in
                   ConversionReport.of(chosen).notes)  # fmt: skip
    chosen = convert(source, weights="raw", **DINOV2)
    assert torch.equal(chosen.state_dict["norm.weight"], wanted.state_dict["norm.weight"] + 1)
    if case != "Meta's run":
        for format in ("auto", "dinov2"):
            says = refused(source, format=format, **DINOV2)
            assert f"without the prefix {bare!r} the names (and those without {one.rstrip('.')!r}) are nearest" in says
            assert f"give --weights {bare}" in says


def test_a_prefix_beside_other_tensors_is_named(dinov2, saved, refused):
    tensors, wanted = dinov2
    for prefix in ("model", "pretrained.vit"):
        source = saved({f"{prefix}.{n}": t for n, t in tensors.items()} | {"depth_head.weight": torch.ones(2, 2)})
        assert f"without the prefix {prefix!r} the names are nearest to dinov2's" in refused(source, **DINOV2)
        assert_same(convert(source, weights=prefix, **DINOV2), wanted)


def test_weights_that_are_not_there(dinov2, saved, refused):
    tensors, _ = dinov2
    source = saved({"state_dict": tensors, "epoch": 3})
    assert "holds no weights under 'nothing'; the sets in it: 'state_dict'" in refused(source, weights="nothing")
    assert "holds no averaged weights" in refused(source, weights="ema")
    assert "holds no raw weights; the sets in it: 'model_ema'" in refused(saved({"model_ema": tensors}), weights="raw")
    parts = {"teacher": {"backbone": tensors, "dino_head": {"mlp.weight": torch.ones(2, 2)}}}
    says = refused(saved(parts))
    assert "2 sets of weights ('teacher.backbone', 'teacher.dino_head'): choose with --weights teacher.backbone" in says
    assert_same(convert(saved(parts), weights="teacher.backbone", **DINOV2), dinov2[1])


def test_files_are_told_by_content(dinov2, saved, tmp_path, refused):
    tensors, wanted = dinov2
    saved(tensors, "right.safetensors").rename(tmp_path / "wrong.bin")
    assert_same(convert(tmp_path / "wrong.bin", **DINOV2), wanted)
    saved(tensors, "right.pth").rename(tmp_path / "wrong.safetensors")
    assert "rename it to end in .pth" in refused(tmp_path / "wrong.safetensors", **DINOV2)
    assert_same(convert(saved({"state_dict": tensors}, "run/model_best.pth.tar").parent, **DINOV2), wanted)


def test_the_hubs_cache_keeps_the_names_of_files(dinov2, saved, tmp_path):
    tensors, wanted = dinov2
    saved(tensors, "blobs/right.safetensors").rename(tmp_path / "blobs/0123abcd")
    (tmp_path / "snapshots/c1").mkdir(parents=True)
    (tmp_path / "snapshots/c1/model.safetensors").symlink_to("../../blobs/0123abcd")
    (tmp_path / "snapshots/c1/above").symlink_to("..")
    for source in (tmp_path / "snapshots/c1", tmp_path / "snapshots/c1/model.safetensors"):
        converted = convert(source, **DINOV2)
        assert_same(converted, wanted)
        assert ConversionReport.of(converted).source == source.name


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, dinov2, tmp_path):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors, suffix)
    for source in (folder, next(folder.glob("*.index.json"))):
        assert_same(convert(source, **DINOV2), wanted)


def test_shards_whose_names_have_dots(dinov2, tmp_path, refused):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())["weight_map"]
    for file in set(content.values()):
        (folder / file).rename(folder / file.replace("model", "model.v1.0"))
    renamed = {name: file.replace("model", "model.v1.0") for name, file in content.items()}
    index.unlink()
    (folder / "model.v1.0.safetensors.index.json").write_text(json.dumps({"weight_map": renamed}))
    assert_same(convert(folder, **DINOV2), wanted)
    assert "one of 2 shards: give their folder" in refused(next(folder.glob("*-of-*")), **DINOV2)


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
