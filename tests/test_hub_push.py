"""What a push sends, where it goes and under which license."""

import json
from dataclasses import replace

import pytest
from hub_faults import sentence, writes
from hub_server import User
from huggingface_hub import HfApi, ModelCard
from models import random_bundle

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import Provenance
from vitreg_hub.errors import HubError, LicenseError
from vitreg_hub.hub import pull, push

REPO = "lab/vit_nano_reg4"

pytestmark = pytest.mark.usefixtures("waited")


@pytest.fixture
def saved(folder):
    return random_bundle().save(folder)


# What a second push does


def test_unchanged_bundle_makes_no_commit(hub, saved, verified):
    first = push(saved, REPO)
    before = len(writes(hub))
    again = push(saved, REPO)
    assert (again.commit, again.url, again.sent) == (first.commit, first.url, ())
    assert len(writes(hub)) == before
    assert len(hub.repos[REPO].commits) == 2


def test_only_changed_files_are_sent(hub, saved, verified):
    push(saved, REPO)
    (saved / "recipe.yaml").write_text("epochs: 1\n")
    bodies = []
    hub.fault = lambda request: bodies.append(request.body) if "/commit/" in request.path else None
    pushed = push(saved, REPO)
    assert "recipe.yaml" in pushed.sent
    assert not {"config.json", "model.safetensors"} & set(pushed.sent)
    sent = [json.loads(line)["value"]["path"] for line in bodies[0].splitlines()[1:]]
    assert sorted(sent) == sorted(pushed.sent)


def test_the_parent_is_the_head_that_was_compared_with(hub, saved, verified):
    headers = []

    def fault(request):
        if "/commit/" in request.path:
            headers.append(json.loads(request.body.splitlines()[0])["value"])

    hub.fault = fault
    push(saved, REPO)
    assert headers[0]["parentCommit"] == hub.repos[REPO].commits[0].oid


def test_figures_and_recipe_travel_and_nothing_else_does(hub, saved, verified, tmp_path):
    extras = {name: name.encode() for name in ("artifacts.png", "curves.png", "recipe.yaml", "metrics.jsonl")}
    for name, content in {**extras, "notes.txt": b"mine", "merges.json": b"{}"}.items():
        (saved / name).write_bytes(content)
    (saved / "state").mkdir()
    (saved / "state" / "optimizer.bin").write_bytes(b"pickle")
    push(saved, REPO)
    assert hub.repos[REPO].files().keys() - {".gitattributes"} == {
        *("config.json", "model.safetensors", "README.md"),
        *extras,
    }
    pulled = pull(REPO, tmp_path / "pulled")
    assert {path.name for path in pulled.iterdir()} == {"config.json", "model.safetensors", "README.md", *extras}
    for name, content in extras.items():
        assert (pulled / name).read_bytes() == content


def test_authors_text_on_the_hub_is_kept_and_our_blocks_follow(hub, tmp_path, verified):
    push(random_bundle().save(tmp_path / "first"), REPO)
    card = hub.repos[REPO].files()["README.md"].decode()
    api = HfApi(endpoint=hub.endpoint, token="hf_good")
    mine = card.replace("<!-- vitreg:usage -->", "Mine,\r\ntoo.\n<!-- vitreg:usage -->", 1) + "\nMy own words, äöü.\n"
    assert "Mine," in mine
    api.upload_file(repo_id=REPO, path_or_fileobj=mine.encode(), path_in_repo="README.md")
    push(random_bundle("vit_nano_reg8").save(tmp_path / "second"), REPO)
    after = hub.repos[REPO].files()["README.md"].decode()
    assert after.endswith("\nMy own words, äöü.\n")
    assert "Mine,\r\ntoo.\n<!-- vitreg:usage -->" in after
    assert "vit_nano_reg8" in after


# Where it goes


def test_new_branch_starts_from_main(hub, tmp_path, verified):
    last = push(random_bundle().save(tmp_path / "last"), REPO)
    best = push(random_bundle("vit_nano_reg2").save(tmp_path / "best"), REPO, branch="best")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": last.commit, "best": best.commit}
    assert repo.commits[-1].parent == last.commit
    assert ModelBundle.load(f"hf-hub:{REPO}").arch == "vit_nano_reg4"
    assert ModelBundle.load(f"hf-hub:{REPO}@best").arch == "vit_nano_reg2"


def test_new_branch_of_a_new_repository(hub, saved, verified):
    pushed = push(saved, REPO, branch="runs/best")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": repo.commits[0].oid, "runs/best": pushed.commit}


def test_pull_request_leaves_the_branch(hub, tmp_path, verified, monkeypatch):
    first = push(random_bundle().save(tmp_path / "first"), REPO)
    hub.tokens["hf_bob"] = User("bob")  # may not write there
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    pushed = push(random_bundle("vit_nano_reg8").save(tmp_path / "second"), REPO, create_pr=True)
    assert pushed.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.repos[REPO].branches == {"main": first.commit}
    assert hub.repos[REPO].pull_requests == {"refs/pr/1": pushed.commit}
    assert ModelBundle.load(f"hf-hub:{REPO}@refs/pr/1").arch == "vit_nano_reg8"


def test_tag_is_set_at_last_and_belongs_to_one_commit(hub, saved, verified, tmp_path):
    first = push(saved, REPO, tag="v1")
    assert hub.repos[REPO].tags == {"v1": first.commit}
    assert [path for verb, path, _ in writes(hub)][-1].endswith(f"/tag/{first.commit}")
    assert push(saved, REPO, tag="v1").commit == first.commit  # nothing changed: it is there already
    assert push(saved, REPO, tag="v1.0").commit == first.commit
    before = len(writes(hub))
    with pytest.raises(HubError, match=r"has a tag v1 already: choose another") as caught:
        push(random_bundle("vit_nano_reg8").save(tmp_path / "other"), REPO, tag="v1")
    sentence(caught)
    assert len(writes(hub)) == before
    assert hub.repos[REPO].tags == {"v1": first.commit, "v1.0": first.commit}


REFUSED_TARGETS = {
    "'a..b' is no name of a branch": {"branch": "a..b"},
    "'refs/pr/1' is no name of a branch": {"branch": "refs/pr/1"},
    "'v 1' is no name of a tag": {"tag": "v 1"},
    "leave --tag out": {"tag": "v2", "create_pr": True},
    "v1 is a tag of": {"branch": "v1"},
    "has no branch none for a pull request": {"branch": "none", "create_pr": True},
    "is public already: make it private": {"private": True},
}


@pytest.mark.parametrize("says", REFUSED_TARGETS)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(hub, saved, verified, tmp_path, says):
    push(saved, REPO, tag="v1")
    other, before = random_bundle("vit_nano_reg8").save(tmp_path / "other"), len(writes(hub))
    with pytest.raises(HubError, match=says) as caught:
        push(other, REPO, **REFUSED_TARGETS[says])
    sentence(caught)
    assert len(writes(hub)) == before


def test_pull_request_needs_a_repository(hub, saved, verified):
    with pytest.raises(HubError, match="no repository lab/none that takes a pull request"):
        push(saved, "lab/none", create_pr=True)
    assert not hub.repos


def test_private_repository(hub, saved, verified):
    push(saved, REPO, private=True)
    assert hub.repos[REPO].private
    push(saved, REPO, private=True)
    push(saved, REPO)
    assert hub.repos[REPO].private


# Under which license


def test_unknown_license_has_to_be_told(hub, folder, verified):
    told = Provenance(origin="somewhere")
    saved = replace(random_bundle(), provenance=told).save(folder)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(LicenseError, match="--license") as caught:
        push(saved, REPO)
    sentence(caught)
    assert not hub.requests
    push(saved, REPO, license="Apache-2.0")
    files = hub.repos[REPO].files()
    config = json.loads(files["config.json"])
    assert config["vitreg"]["provenance"]["license"] == config["pretrained_cfg"]["license"] == "apache-2.0"
    assert ModelCard(files["README.md"].decode()).data.license == "apache-2.0"
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert ModelBundle.load(f"hf-hub:{REPO}").provenance.license == "apache-2.0"
    push(saved, "lab/nobody-knows", license="unknown")
    assert hub.repos["lab/nobody-knows"].files()["config.json"] == before["config.json"]
