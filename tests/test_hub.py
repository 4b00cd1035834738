"""Push and pull with huggingface_hub's real client, against the stand-in Hub."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import Drop
from huggingface_hub import constants
from models import random_bundle

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.errors import BundleError, HubError
from vitreg_hub.hub import pull, push
from vitreg_hub.model_cards.card import render

REPO = "lab/vit_nano_reg4"


@pytest.fixture
def saved(folder):
    return random_bundle().save(folder)


@pytest.fixture
def verified(monkeypatch):
    """Skip the doors, which take seconds: other tests open them."""
    asked = []
    monkeypatch.setattr("vitreg_hub.hub.verify", asked.append)
    return asked


def test_published_bundle_is_the_same_through_every_door_in_fresh_processes(hub, saved, tmp_path):
    push(saved, REPO)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    script = """
import json, sys
{plugin}
import timm, torch
from PIL import Image
from transformers import AutoBackbone, AutoImageProcessor, AutoModel
images = torch.load(sys.argv[2], weights_only=True)
timm_model = timm.create_model("hf-hub:" + sys.argv[1], pretrained=True).eval()
hf_model = AutoModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    found = {{"timm": timm_model.forward_features(images), "transformers": hf_model(images).last_hidden_state}}
    processor = AutoImageProcessor.from_pretrained(sys.argv[1])
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(timm_model))
    picture = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB")
    assert torch.equal(processor(picture).pixel_values[0], transform(picture))
    if {backbone}:
        backbone = AutoBackbone.from_pretrained(sys.argv[1], out_indices=[4], reshape_hidden_states=False).eval()
        found["backbone"] = backbone(images).feature_maps[0]
print(json.dumps([type(hf_model).__name__, {{door: x.flatten().tolist() for door, x in found.items()}}]))
"""
    ours = ModelBundle.load(saved).build().forward_features(images).flatten()
    for plugin, model_name in (("import vitreg_hub", "VitRegModel"), ("", "TimmWrapperModel")):
        source = script.format(plugin=plugin, backbone=bool(plugin))
        env = {**os.environ, "HF_HOME": str(tmp_path / f"home{bool(plugin)}")}
        run = [sys.executable, "-c", source, REPO, str(tmp_path / "images.pt")]
        name, doors = json.loads(subprocess.run(run, env=env, check=True, stdout=subprocess.PIPE).stdout)
        assert name == model_name
        assert len(doors) == (3 if plugin else 2)
        for door, values in doors.items():
            assert torch.equal(torch.tensor(values), ours), door


def test_push_is_one_commit_with_a_card(hub, saved, verified):
    url = push(saved, REPO)
    repo = hub.repos[REPO]
    assert verified == [saved]
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert url.endswith(repo.commits[-1].oid)
    files = repo.files()
    assert set(files) - {".gitattributes"} == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card
    assert "**Measured:** not measured" in card


def test_card_of_the_folder_is_sent_and_the_repositorys_own_kept(hub, tmp_path, verified):
    saved = random_bundle().save(tmp_path / "first", card="# ours\n")
    push(saved, REPO)
    assert hub.repos[REPO].files()["README.md"] == b"# ours\n"
    push(random_bundle().save(tmp_path / "second", card="# other\n"), REPO)
    assert hub.repos[REPO].files()["README.md"] == b"# ours\n"


def test_card_without_a_repository_gets_the_real_one(hub, tmp_path, verified):
    bundle = random_bundle()
    push(bundle.save(tmp_path / "quickstart", card=render(bundle)), REPO)
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "your-name" not in card
    assert card.count(REPO) == 3


def test_nothing_is_sent_of_a_folder_that_fails_a_door(hub, saved):
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(BundleError, match="R6"):
        push(saved, REPO)
    assert not hub.requests


def test_pull_gives_the_same_files_and_works_offline(hub, saved, verified, tmp_path, monkeypatch):
    push(saved, REPO)
    pulled = pull(REPO, tmp_path / "pulled")
    for file in ("config.json", "model.safetensors"):
        assert (pulled / file).read_bytes() == (saved / file).read_bytes()
    assert "vitreg" in (pulled / "README.md").read_text()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline = ModelBundle.load(f"hf-hub:{REPO}")
    assert offline.config() == ModelBundle.load(saved).config()
    assert len(hub.requests) == requests


def test_revisions(hub, saved, verified, tmp_path):
    push(saved, REPO)
    first = hub.repos[REPO].commits[-1].oid
    other = random_bundle("vit_nano_reg8").save(tmp_path / "other")
    push(other, REPO)
    assert ModelBundle.load(f"hf-hub:{REPO}").arch == "vit_nano_reg8"
    assert ModelBundle.load(f"hf-hub:{REPO}@{first}").arch == "vit_nano_reg4"
    with pytest.raises(HubError, match="no such branch, tag or commit") as caught:
        pull(f"{REPO}@nothing", tmp_path / "pulled")
    one_sentence(caught)
    assert not (tmp_path / "pulled").exists()


def test_pull_into_an_existing_folder_asks_nothing_of_the_hub(hub, tmp_path):
    with pytest.raises(BundleError, match="exists: choose another folder"):
        pull(REPO, tmp_path)
    assert not hub.requests


@pytest.mark.parametrize(("answer", "says"), [(403, "sending to lab/vit_nano_reg4 failed"), (500, "sending to")])
def test_upload_that_breaks_off_is_one_sentence(answer, says, hub, saved, verified, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    hub.fault = lambda request: (answer, {}, b"") if request.command == "PUT" else None
    with pytest.raises(HubError, match=says) as caught:
        push(saved, REPO)
    one_sentence(caught)
    assert len(hub.repos[REPO].commits) == 1  # the Hub's own


def test_refused_commit_is_one_sentence(hub, saved, verified):
    hub.fault = lambda request: (400, {}, b"no\nsuch\nluck") if "/commit/" in request.path else None
    with pytest.raises(HubError, match="refused the request for lab/vit_nano_reg4 with status 400") as caught:
        push(saved, REPO)
    one_sentence(caught)


def one_sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_push_without_a_token(hub, saved, verified, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token: run `hf auth login` or set HF_TOKEN") as caught:
        push(saved, REPO)
    one_sentence(caught)
    assert not hub.requests


@pytest.mark.parametrize(("token", "says"), [("hf_wrong", "missing or invalid"), ("hf_reader", "may not do this")])
def test_push_with_a_token_that_does_not_do(token, says, hub, saved, verified, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=says) as caught:
        push(saved, REPO)
    one_sentence(caught)
    assert REPO not in hub.repos


def test_push_to_someone_elses_name(hub, saved, verified):
    with pytest.raises(HubError, match="may not do this"):
        push(saved, "someone/model")
    with pytest.raises(HubError, match="is no repository id"):
        push(saved, "too/many/parts")


def test_pull_of_a_missing_repository(hub, tmp_path):
    with pytest.raises(HubError, match=r"no repository lab/nothing at http://127\.0\.0\.1") as caught:
        pull("lab/nothing", tmp_path / "pulled")
    one_sentence(caught)


def test_no_network(hub, saved, verified, tmp_path):
    hub.__exit__(None, None, None)
    for act in (lambda: push(saved, REPO), lambda: pull(REPO, tmp_path / "pulled")):
        with pytest.raises(HubError, match="cannot be reached") as caught:
            act()
        one_sentence(caught)


def test_dropped_download_leaves_nothing(hub, saved, verified, tmp_path):
    push(saved, REPO)

    def fault(request):
        if "model.safetensors" in request.path:
            raise Drop

    hub.fault = fault
    with pytest.raises(HubError, match="cannot be reached"):
        pull(REPO, tmp_path / "target" / "pulled")
    assert not (tmp_path / "target").exists()


def test_repository_that_is_no_bundle(hub, tmp_path):
    timm.models.push_to_hf_hub(timm.create_model("test_vit"), "lab/plain", safe_serialization=True)
    with pytest.raises(BundleError, match=r"no bundle: its config\.json has no 'vitreg' entry"):
        pull("lab/plain", tmp_path / "pulled")


def test_published_dinov2_weights_come_from_timms_repository(hub):
    source = timm.create_model("vit_small_patch14_reg4_dinov2")
    timm.models.push_to_hf_hub(source, "lab/source", safe_serialization=True)
    hub.repos["timm/vit_small_patch14_reg4_dinov2.lvd142m"] = hub.repos["lab/source"]
    bundle = ModelBundle.load("vit_small_reg4")
    assert bundle.provenance.origin == "weights of hf-hub:timm/vit_small_patch14_reg4_dinov2.lvd142m"
    assert bundle.provenance.license == "apache-2.0"
    by_name = timm.create_model("vit_small_reg4", pretrained=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(bundle.state_dict[name], tensor)
        assert torch.equal(by_name.state_dict()[name], tensor)
