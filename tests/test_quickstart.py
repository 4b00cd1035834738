"""The main job, shortened: train, bundle, verify, draw, publish, load back."""

import json

import pytest
import timm
import torch
from PIL import Image

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.datasets import digits
from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.training.quickstart import quickstart
from vitreg_hub.training.supervised import Recipe, train

SHORT = Recipe(epochs=1, batch_size=64)


def test_quickstart_publishes_what_it_trained(hub, tmp_path):
    result = quickstart(tmp_path / "run", push_to="lab/digits", recipe=SHORT)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model", "tokens.png"]
    assert set(result.doors.values()) == {0.0}
    repo = hub.repos["lab/digits"]
    assert result.commit.endswith(repo.commits[-1].oid)
    assert repo.files()["model.safetensors"] == (result.model / "model.safetensors").read_bytes()
    card = repo.files()["README.md"].decode()
    assert f"value: {result.accuracy}" in card
    assert "loss" not in card
    assert 'timm.create_model("hf-hub:lab/digits", pretrained=True)' in card
    provenance = json.loads((result.model / "config.json").read_text())["vitreg"]["provenance"]
    assert provenance["metrics"]["accuracy"] == result.accuracy
    with Image.open(result.figure) as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 300  # pictures, not blank paper


def test_trained_bundle_has_the_accuracy_that_it_claims():
    test_set = digits("test")
    result = train(SHORT, train_set=digits("train"), test_set=test_set, dataset="digits")
    assert [set(epoch) for epoch in result.history] == [{"epoch", "loss", "accuracy"}]
    assert accuracy(result.bundle.build(), test_set) == pytest.approx(result.accuracy, abs=1e-6)


@pytest.mark.parametrize("arch", ["vit_nano_reg0", "vit_nano_reg4"])
def test_shipped_weights_have_the_accuracy_that_they_claim(arch):
    claimed = ModelBundle.load(f"{arch}.digits").provenance.metrics["accuracy"]
    assert claimed >= 0.97
    model = timm.create_model(arch, pretrained=True).eval()
    assert accuracy(model, digits("test")) == pytest.approx(claimed, abs=0.003)  # one image more or less


@torch.inference_mode()
def accuracy(model, test_set) -> float:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(row["image"]) for row in test_set])
    return (model(images).argmax(1) == torch.tensor(test_set["label"][:])).float().mean().item()


def test_same_seed_same_weights():
    few = digits("train").select(range(48))
    recipe = Recipe(epochs=1, batch_size=16)
    first, second = (train(recipe, train_set=few, test_set=few, dataset="few").bundle.state_dict for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    other = train(Recipe(epochs=1, batch_size=16, seed=1), train_set=few, test_set=few, dataset="few")
    assert not torch.equal(other.bundle.state_dict["reg_token"], first["reg_token"])


def test_publishing_without_a_token_is_refused_before_the_work(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token"):
        quickstart(tmp_path / "run", push_to="lab/digits")
    assert not (tmp_path / "run").exists()
    assert not hub.requests


def test_existing_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(BundleError, match="exists: choose another folder"):
        quickstart(tmp_path)
    assert not list(tmp_path.iterdir())
