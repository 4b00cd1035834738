"""Pushes to repositories in which something is: another model, an author's card, towers that everyone sees."""

import json

import pytest
import torch
from hub_faults import sentence, writes
from huggingface_hub import HfApi, ModelCard
from models import random_bundle
from pushers import plan, push
from safetensors.torch import save_file

from vitreg_hub.bundle.doors import DOORS
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, HubError, HubRefusedError, LicenseError
from vitreg_hub.hub import publish as publishing
from vitreg_hub.hub import pull

REPO = "lab/model"

pytestmark = pytest.mark.usefixtures("waited")


@pytest.fixture
def saved(folder):
    return random_bundle().save(folder)


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_good")


def put(api: HfApi, content: bytes, name: str) -> None:
    api.create_repo(REPO, exist_ok=True)
    api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=name)


def card_on(hub) -> str:
    return hub.repos[REPO].files()["README.md"].decode()


# Other models


@pytest.mark.parametrize(
    "name",
    [
        *("preprocessor_config.json", "processor_config.json", "pytorch_model.bin", "tf_model.h5"),
        *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "open_clip_config.json"),
    ],
)
def test_files_of_another_model_stop_a_push(hub, api, saved, name):
    put(api, b"{}", name)
    before = len(writes(hub))
    for attempt in (plan, push):
        with pytest.raises(HubRefusedError, match=rf"files of another model \({name}\).* delete them there") as caught:
            attempt(saved, REPO)
        sentence(caught)
    assert len(writes(hub)) == before
    api.delete_file(name, REPO)
    push(saved, REPO)


def test_files_of_no_model_do_not(hub, api, saved):
    for name in ("notes.txt", "data/pytorch_model.bin", "model.onnx", "features.npy", "examples.json"):
        put(api, b"{}", name)
    push(saved, REPO)
    assert ModelBundle.load(f"hf-hub:{REPO}").arch == "vit_nano_reg4"


def test_model_that_is_replaced_is_told_once(hub, api, saved, caplog):
    put(api, b'{"model_type": "vit"}', "config.json")
    put(api, b"# Old\n", "README.md")
    plan(saved, REPO)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"the card of {REPO} is its author's and stays as it is: check that it describes these weights.",
        f"{REPO} holds a model that is not a bundle: it will be replaced, and remain in the history only.",
    ]
    push(saved, REPO)
    assert hub.repos[REPO].files()["README.md"] == b"# Old\n"
    caplog.clear()
    push(random_bundle("vit_nano_reg8").save(saved.parent / "other"), REPO)
    assert [record.getMessage() for record in caplog.records] == told[:1]


# Cards


def test_doors_of_a_push_are_told_by_card_and_config(hub, saved, tmp_path):
    push(saved, REPO)
    measured = dict.fromkeys(DOORS, 0.0)
    assert json.loads(hub.repos[REPO].files()["config.json"])["vitreg"]["provenance"]["doors"] == measured
    assert "vitreg_hub: not measured" not in card_on(hub)
    pulled = pull(REPO, tmp_path / "pulled")
    assert ModelBundle.load(pulled).provenance.doors == measured
    assert push(pulled, REPO).sent == ()


def test_authors_text_in_the_folder_is_told_where_the_hub_has_it_not(hub, api, saved, caplog):
    push(saved, REPO)
    (saved / "README.md").write_text(card_on(hub))
    put(api, f"{card_on(hub)}\nOf the Hub.\n".encode(), "README.md")
    push(saved, REPO)
    assert not caplog.records  # all that the folder's card says is there
    (saved / "README.md").write_text((saved / "README.md").read_text() + "\nOf the folder.\n")
    push(saved, REPO)
    assert "Of the folder." not in card_on(hub)
    assert [record.getMessage() for record in caplog.records] == [
        f"{REPO} keeps the text of its card, and what the folder's README.md says outside our blocks is not published: "
        "edit the card on the Hub."
    ]


def test_card_that_is_no_text_is_refused_before_a_repository_is_made(hub, saved):
    (saved / "README.md").write_bytes(b"# Caf\xe9\n")
    for attempt in (plan, push):
        with pytest.raises(BundleError, match=r"README\.md is not UTF-8 \(byte 5\)") as caught:
            attempt(saved, REPO)
        sentence(caught)
    assert not hub.repos


def test_license_is_asked_for_before_the_doors(hub, saved):
    (saved / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Mine\n")
    opened = []
    with pytest.raises(LicenseError):
        push(saved, REPO, verify=lambda folder, **_: opened.append(folder) or {})
    assert not opened


# Towers


@pytest.fixture
def towers(saved):
    """Both towers beside the bundle, as far as a push looks at them."""
    both = saved.with_name(f"{saved.name}-open_clip")
    both.mkdir()
    (both / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 16}}')
    save_file({"visual.trunk.reg_token": torch.zeros(1, 4, 8)}, both / "open_clip_model.safetensors")
    return both


def test_towers_that_everyone_sees_stop_the_push_of_a_private_bundle(hub, api, saved, towers):
    api.create_repo(f"{REPO}-open_clip")
    api.create_repo(REPO, private=True)
    before = len(writes(hub))
    for attempt in (plan, push):
        with pytest.raises(HubRefusedError, match=f"{REPO}-open_clip is public already: make it private") as caught:
            attempt(saved, REPO)
        sentence(caught)
    assert len(writes(hub)) == before


def test_towers_that_fail_after_the_bundle_are_told(hub, saved, towers):
    hub.fault = lambda request: (403, b"{}") if f"{REPO}-open_clip/commit/" in request.path else None
    with pytest.raises(
        HubError, match=rf"the bundle is pushed \({hub.endpoint}/.*\), but not its text tower"
    ) as caught:
        push(saved, REPO)
    sentence(caught)
    assert "config.json" in hub.repos[REPO].files()
    assert "open_clip_model.safetensors" not in hub.repos[f"{REPO}-open_clip"].files()


def test_authors_metadata_of_the_towers_card_keep_every_character(hub, api, saved, towers):
    push(saved, REPO)
    repo = f"{REPO}-open_clip"
    card = hub.repos[repo].files()["README.md"].decode()
    mine = card.replace("---\n", "---\n# who we are\nlanguage: [en,   de]\n", 1)
    mine = mine.replace("\nlicense: mit\n", "\nlicense: mit  # agreed\n").replace("\n- clip\n", "\n")
    told = ModelCard(card).data.to_dict()
    tags = [tag for tag in told["tags"] if tag != "clip"]
    assert ModelCard(mine).data.to_dict() == told | {"language": ["en", "de"], "tags": tags}
    api.upload_file(repo_id=repo, path_or_fileobj=mine.encode(), path_in_repo="README.md")
    assert push(saved, REPO).text_tower.sent == ()
    assert hub.repos[repo].files()["README.md"].decode() == mine


# What is there, at the end


def test_repository_that_cannot_be_read_after_it_was_made(hub, saved, monkeypatch):
    monkeypatch.setattr(publishing, "look", lambda *_: None)
    with pytest.raises(HubError, match=f"{REPO} was made but cannot be read"):
        push(saved, REPO)


def test_taken_tag_stops_a_push_that_changes_nothing(hub, saved, tmp_path):
    push(saved, REPO, tag="v1")
    other = random_bundle("vit_nano_reg8").save(tmp_path / "other")
    push(other, REPO)
    before = len(writes(hub))
    for attempt in (plan, push):
        with pytest.raises(HubRefusedError, match="has a tag v1 already"):
            attempt(other, REPO, tag="v1")
    assert len(writes(hub)) == before


@pytest.mark.parametrize("name", ["HEAD", "a.lock", "a" * 201, "refs/heads/a", "-a"])
def test_names_that_git_has_not(hub, saved, name):
    for kind in ("branch", "tag"):
        with pytest.raises(HubRefusedError, match=f"is not a valid {kind} name") as caught:
            push(saved, REPO, **{kind: name})
        sentence(caught)
    assert not hub.requests


def test_nothing_damaged_and_nothing_too_large_is_pulled(hub, api, saved, tmp_path, monkeypatch):
    push(saved, REPO)
    asked = []
    monkeypatch.setattr(publishing, "require_space", lambda folder, size, *, what: asked.append((folder, size)))
    pulled = pull(REPO, tmp_path / "pulled")
    assert asked == [(pulled, sum(path.stat().st_size for path in pulled.iterdir()))]
    config = json.loads(hub.repos[REPO].files()["config.json"])
    config["vitreg"]["form"] = -1
    put(api, json.dumps(config).encode(), "config.json")
    with pytest.raises(BundleError):
        pull(REPO, tmp_path / "again")
    assert not (tmp_path / "again").exists()
