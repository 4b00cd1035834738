"""The main job, shortened: train, bundle, verify, draw, publish, load back."""

import json
import os
import signal
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, HubError, RecipeError, TrainingError
from vitreg_hub.images.embedded import digits
from vitreg_hub.training.loop import train
from vitreg_hub.training.quickstart import quickstart
from vitreg_hub.training.recipes.files import write_recipe
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.run import trainer

pytestmark = pytest.mark.usefixtures("warm")

DIGITS = RECIPES["supervised_digits"]()
SHORT = replace(
    DIGITS,
    batch_size=64,
    epochs=0.1,
    optim=replace(DIGITS.optim, warmup_epochs=0),
    watch=replace(DIGITS.watch, eval_images=32),
)


def test_quickstart_publishes_what_it_trained(hub, tmp_path):
    out = tmp_path / "run"
    result = quickstart(out, push_to="lab/digits", recipe=SHORT)
    assert (result.model, result.figure) == (out / "model", out / "tokens.png")
    made = {
        "model",
        "best",
        "tokens.png",
        "curves.png",
        "first_batch.png",
        "recipe.yaml",
        "metrics.jsonl",
        "checkpoints",
    }
    assert {path.name for path in out.iterdir()} == made
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
    assert provenance["made"]["recipe"]["optim"]["lr"] == SHORT.optim.lr
    with Image.open(result.figure) as figure:
        assert figure.width > 1000
        assert len(figure.convert("RGB").getcolors(figure.width * figure.height)) > 300  # pictures, not blank paper


def test_trained_bundle_has_the_accuracy_that_it_claims(tmp_path):
    started = replace(SHORT, model=replace(SHORT.model, start="vit_nano_reg4.digits"), watch=DIGITS.watch)
    result = train(started, tmp_path / "run")
    claimed = result.metrics["eval/accuracy"]
    assert 0.2 < claimed < 1  # which no constant guess would have
    assert accuracy(ModelBundle.load(result.model).build(), digits("test")) == pytest.approx(claimed, abs=1e-6)


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


def test_same_seed_same_weights(tmp_path):
    recipes = {"first": SHORT, "second": SHORT, "other": replace(SHORT, seed=1)}
    weights = {
        name: ModelBundle.load(train(recipe, tmp_path / name).model).state_dict for name, recipe in recipes.items()
    }
    assert all(torch.equal(tensor, weights["second"][name]) for name, tensor in weights["first"].items())
    assert not torch.equal(weights["other"]["reg_token"], weights["first"]["reg_token"])


def test_stopped_quickstart_goes_on_and_a_finished_one_tells_its_results_again(tmp_path, monkeypatch):
    step_of, done = trainer.Trainer.do_step, []

    def do_step(self, step, *args):
        done.append(step)
        if done == [0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, step, *args)

    monkeypatch.setattr(trainer.Trainer, "do_step", do_step)
    monkeypatch.setattr("vitreg_hub.training.quickstart.verify", lambda model: {})  # takes seconds; see above
    with pytest.raises(TrainingError, match="stopped after step 1 of 2: run the same command again") as caught:
        quickstart(tmp_path / "run", recipe=SHORT)
    assert "\n" not in str(caught.value)
    assert not {"model", "tokens.png"} & {path.name for path in (tmp_path / "run").iterdir()}
    result = quickstart(tmp_path / "run", recipe=SHORT)
    assert done == [0, 1]
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert quickstart(tmp_path / "run", recipe=SHORT) == result
    assert done == [0, 1]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_publishing_without_a_token_is_refused_before_the_work(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token"):
        quickstart(tmp_path / "run", push_to="lab/digits")
    assert not (tmp_path / "run").exists()
    assert not hub.requests


def test_folder_with_something_else_is_refused_before_the_work(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="holds no run: choose another folder"):
        quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_run_of_another_recipe_is_not_gone_on_with(tmp_path):
    write_recipe(SHORT, tmp_path)
    with pytest.raises(RecipeError, match="seed") as caught:
        quickstart(tmp_path, recipe=replace(SHORT, seed=1))
    assert "\n" not in str(caught.value)
