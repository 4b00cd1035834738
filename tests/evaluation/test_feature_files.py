"""Features in files: those of the network, the same after any stop."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from models import random_bundle
from pictures import data_set, picture
from safetensors.torch import load_file

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.feature_files import INDEX_FILE, load_features, write_features
from vitreg_hub.tokens import observe

IMAGES = 11
OPTIONS = {"batch_size": 2, "shard_size": 4, "progress": False}


@pytest.fixture(scope="module")
def model():
    return random_bundle().build()


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes."""
    for i in range(IMAGES):
        file = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(20 * i).save(file)
    return tmp_path / "images"


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


OF_TOKENS = {
    "class": lambda tokens: tokens.cls[:, 0],
    "registers": lambda tokens: tokens.registers,
    "patches-mean": lambda tokens: tokens.patches.mean(dim=1),
    "dense": lambda tokens: tokens.patches.reshape(IMAGES, 8, 8, 128),
}


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_features_are_those_of_the_network(kind, model, tmp_path):
    images = torch.randn(IMAGES, 3, 32, 32)
    write_features(model, images, tmp_path / "out", kind=kind, **OPTIONS)
    found = load_features(tmp_path / "out")
    wanted = OF_TOKENS[kind](observe(model, images, normed=True).normed)
    assert found.features.shape == wanted.shape
    assert torch.allclose(found.features, wanted, atol=1e-5)
    assert found.indices.tolist() == list(range(IMAGES))
    assert found.labels is None
    assert found.images == ("",) * IMAGES
    second = load_features(tmp_path / "out", shards=[1])
    assert torch.equal(second.features, found.features[4:8])


def test_files_and_labels_are_told(model, folder, tmp_path):
    index = write_features(model, folder, tmp_path / "out", store="bfloat16", **OPTIONS)
    assert sorted(content(tmp_path / "out")) == [*(f"features-{i:05}.safetensors" for i in range(3)), INDEX_FILE]
    told = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert told["complete"]
    assert told["settings"]["class_names"] == ["a", "b"]
    assert told["settings"]["images"] == str(folder)
    assert told["shards"][0] == {
        "file": "features-00000.safetensors",
        "images": [f"a/{i:02}.png" for i in (0, 2, 4, 6)],
    }
    found = load_features(tmp_path / "out")
    assert found.index == index
    assert found.features.dtype == torch.bfloat16
    assert found.labels.tolist() == [int(image.startswith("b")) for image in found.images] == 6 * [0] + 5 * [1]
    assert load_file(tmp_path / "out" / "features-00002.safetensors")["indices"].tolist() == [8, 9, 10]


def test_a_run_that_was_stopped_goes_on(model, folder, tmp_path):
    write_features(model, folder, tmp_path / "whole", **OPTIONS)
    broken = folder / "b" / "05.png"  # in the third file
    stored = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(DataError, match=r"05\.png"):
        write_features(model, folder, tmp_path / "out", **OPTIONS)
    assert list(content(tmp_path / "out")) == ["features-00000.safetensors", "features-00001.safetensors", INDEX_FILE]
    with pytest.raises(DataError, match="are incomplete \\(2 files\\)"):
        load_features(tmp_path / "out")
    written = (tmp_path / "out" / "features-00000.safetensors").stat().st_mtime_ns
    broken.write_bytes(stored)
    write_features(model, folder, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert (tmp_path / "out" / "features-00000.safetensors").stat().st_mtime_ns == written


def test_what_a_killed_process_leaves_is_replaced(model, folder, tmp_path):
    index = write_features(model, folder, tmp_path / "out", **OPTIONS)
    whole = content(tmp_path / "out")
    told = json.loads(whole[INDEX_FILE])
    (tmp_path / "out" / INDEX_FILE).write_text(json.dumps(told | {"shards": told["shards"][:1], "complete": False}))
    (tmp_path / "out" / index.shards[1].file).write_bytes(b"half")
    (tmp_path / "out" / ".features-00001.safetensors-abc").mkdir()
    write_features(model, folder, tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == whole


class Stop(Exception):
    """What ends a process from outside."""


@pytest.mark.parametrize("number", [8, IMAGES])
def test_a_stream_goes_on(number, model, tmp_path):
    data = data_set(number)

    def rows(last):
        for i in range(number):
            if i == last:
                raise Stop
            yield data[i]

    def stream(last=None):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"last": last}, features=data.features)

    write_features(model, stream(), tmp_path / "whole", **OPTIONS)
    with pytest.raises(Stop):
        write_features(model, stream(last=6), tmp_path / "out", **OPTIONS)
    assert list(content(tmp_path / "out")) == ["features-00000.safetensors", INDEX_FILE]
    write_features(model, stream(), tmp_path / "out", **OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    found = load_features(tmp_path / "out")
    assert found.indices.tolist() == list(range(number))
    assert found.labels.tolist() == [i % 3 for i in range(number)]
    write_features(model, data, tmp_path / "indexed", **OPTIONS)
    assert torch.equal(load_features(tmp_path / "indexed").features, found.features)


def test_batches_and_file_sizes_change_nothing_beyond_rounding(model, tmp_path):
    images = torch.randn(IMAGES, 3, 32, 32)
    write_features(model, images, tmp_path / "a", **OPTIONS)
    write_features(model, images, tmp_path / "b", **OPTIONS | {"batch_size": 3, "shard_size": 5})
    a, b = (load_features(tmp_path / name).features for name in "ab")
    assert torch.allclose(a, b, atol=1e-5)


OTHER = {"kind": {"kind": "dense"}, "dtype": {"store": "float16"}, "shard size": {"shard_size": 5}}


@pytest.mark.parametrize("setting", OTHER)
def test_features_of_other_settings_are_not_mixed(setting, model, tmp_path):
    images = torch.randn(IMAGES, 3, 32, 32)
    write_features(model, images, tmp_path / "out", **OPTIONS)
    with pytest.raises(DataError, match=f"out holds features of another {setting} "):
        write_features(model, images, tmp_path / "out", **OPTIONS | OTHER[setting])


def test_mistakes(model, tmp_path):
    images = torch.randn(IMAGES, 3, 32, 32)
    index = write_features(model, images, tmp_path / "out", **OPTIONS)
    other = random_bundle().build()
    with torch.no_grad():
        other.pos_embed[0, 0, 0] += 1
    with pytest.raises(DataError, match="features of another weights "):
        write_features(other, images, tmp_path / "out", **OPTIONS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(DataError, match="exists and holds no features"):
        write_features(model, images, tmp_path / "mine", **OPTIONS)
    with pytest.raises(DataError, match="the model has no registers tokens: choose class, patches-mean or dense"):
        write_features("vit_nano_reg0.digits", images, tmp_path / "new", kind="registers", **OPTIONS)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DataError, match=r"holds no index\.json"):
        load_features(tmp_path / "mine")
    with pytest.raises(DataError, match="there is no shard 3 in "):
        load_features(tmp_path / "out", shards=[3])
    (tmp_path / "out" / index.shards[1].file).unlink()
    with pytest.raises(DataError, match=r"lacks features-00001\.safetensors"):
        write_features(model, images, tmp_path / "out", **OPTIONS)


def test_memory_is_bounded_by_one_file(model, tmp_path):
    index = write_features(model, torch.randn(2, 3, 32, 32), tmp_path / "out", kind="dense", progress=False)
    assert index.settings.shard_size == 2**28 // (64 * 128 * 4)
    assert index == replace(index, complete=True)
