"""What a push sends, where it goes and under which license."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hub_faults import LOSE, Fault, sentence, writes
from hub_server import User
from huggingface_hub import HfApi, ModelCard
from models import random_bundle
from pushers import plan, push

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import HubError, LicenseError
from vitreg_hub.hub import pull

REPO = "lab/vit_nano_reg4"

pytestmark = pytest.mark.usefixtures("waited")


@pytest.fixture
def saved(folder):
    return random_bundle().save(folder)


# What a second push does


def test_unchanged_bundle_makes_no_commit(hub, saved):
    first = push(saved, REPO)
    before = len(writes(hub))
    again = push(saved, REPO)
    assert (again.commit, again.url, again.sent) == (first.commit, first.url, ())
    assert len(writes(hub)) == before
    assert len(hub.repos[REPO].commits) == 2


def test_only_changed_files_are_sent(hub, saved):
    push(saved, REPO)
    (saved / "recipe.yaml").write_text("epochs: 1\n")
    bodies = []
    hub.fault = lambda request: bodies.append(request.body) if "/commit/" in request.path else None
    pushed = push(saved, REPO)
    assert "recipe.yaml" in pushed.sent
    assert not {"config.json", "model.safetensors"} & set(pushed.sent)
    sent = [json.loads(line)["value"]["path"] for line in bodies[0].splitlines()[1:]]
    assert sorted(sent) == sorted(pushed.sent)


def test_the_parent_is_the_head_that_was_compared_with(hub, saved):
    headers = []

    def fault(request):
        if "/commit/" in request.path:
            headers.append(json.loads(request.body.splitlines()[0])["value"])

    hub.fault = fault
    push(saved, REPO)
    assert headers[0]["parentCommit"] == hub.repos[REPO].commits[0].oid


def test_figures_and_recipe_travel_and_nothing_else_does(hub, saved, tmp_path):
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


def test_authors_text_on_the_hub_is_kept_and_our_blocks_follow(hub, tmp_path):
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


def test_what_tells_of_earlier_weights_goes_with_them(hub, tmp_path):
    first = random_bundle().save(tmp_path / "first")
    for name in ("artifacts.png", "metrics.jsonl"):
        (first / name).write_bytes(b"of the first")
    push(first, REPO)
    HfApi(endpoint=hub.endpoint, token="hf_good").upload_file(
        repo_id=REPO, path_or_fileobj=b"mine", path_in_repo="notes.txt"
    )
    second = random_bundle("vit_nano_reg8").save(tmp_path / "second")
    (second / "metrics.jsonl").write_bytes(b"of the second")
    states = {file.name: file.state for file in plan(second, REPO).files}
    assert states["artifacts.png"] == "deleted"
    assert states["metrics.jsonl"] == states["config.json"] == "changed"
    assert "curves.png" not in states
    pushed = push(second, REPO)
    files = hub.repos[REPO].files()
    assert pushed.deleted == ("artifacts.png",)
    assert not {"artifacts.png", "curves.png"} & set(pushed.sent)
    assert "artifacts.png" not in files
    assert (files["metrics.jsonl"], files["notes.txt"]) == (b"of the second", b"mine")
    assert push(second, REPO).sent == ()


def test_lost_reply_to_a_commit_that_deletes_is_found(hub, tmp_path):
    first = random_bundle().save(tmp_path / "first")
    (first / "artifacts.png").write_bytes(b"of the first")
    push(first, REPO)
    hub.fault = Fault(method="POST", path="/commit/", act=LOSE, times=1).on(hub)
    pushed = push(random_bundle("vit_nano_reg8").save(tmp_path / "second"), REPO)
    assert len(hub.repos[REPO].commits) == 3
    assert hub.repos[REPO].branches["main"] == pushed.commit
    assert "artifacts.png" not in hub.repos[REPO].files()


# Where it goes


def test_new_branch_starts_from_main(hub, tmp_path):
    last = push(random_bundle().save(tmp_path / "last"), REPO)
    best = push(random_bundle("vit_nano_reg2").save(tmp_path / "best"), REPO, branch="best")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": last.commit, "best": best.commit}
    assert repo.commits[-1].parent == last.commit
    assert ModelBundle.load(f"hf-hub:{REPO}").arch == "vit_nano_reg4"
    assert ModelBundle.load(f"hf-hub:{REPO}@best").arch == "vit_nano_reg2"


def test_new_branch_of_a_new_repository(hub, saved):
    pushed = push(saved, REPO, branch="runs/best")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": repo.commits[0].oid, "runs/best": pushed.commit}


def test_pull_request_leaves_the_branch(hub, tmp_path, monkeypatch):
    first = push(random_bundle().save(tmp_path / "first"), REPO)
    hub.tokens["hf_bob"] = User("bob")  # may not write there
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    pushed = push(random_bundle("vit_nano_reg8").save(tmp_path / "second"), REPO, create_pr=True)
    assert pushed.pull_request == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.repos[REPO].branches == {"main": first.commit}
    assert hub.repos[REPO].pull_requests == {"refs/pr/1": pushed.commit}
    assert ModelBundle.load(f"hf-hub:{REPO}@refs/pr/1").arch == "vit_nano_reg8"


def test_tag_is_set_at_last_and_belongs_to_one_commit(hub, saved, tmp_path):
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
    "'a..b' is not a valid branch name": {"branch": "a..b"},
    "'refs/pr/1' is not a valid branch name": {"branch": "refs/pr/1"},
    "'v 1' is not a valid tag name": {"tag": "v 1"},
    "leave --tag out": {"tag": "v2", "create_pr": True},
    "v1 is a tag of": {"branch": "v1"},
    "has no branch none for a pull request": {"branch": "none", "create_pr": True},
    "is public already: make it private": {"private": True},
    "main is a branch, and a tag of that name would hide it": {"tag": "main"},
    "new is a branch, and a tag of that name would hide it": {"branch": "new", "tag": "new"},
    "has a branch other, which a tag of that name would hide": {"tag": "other"},
}


@pytest.mark.parametrize("says", REFUSED_TARGETS)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(hub, saved, tmp_path, says):
    push(saved, REPO, tag="v1")
    push(saved, REPO, branch="other")
    other, before = random_bundle("vit_nano_reg8").save(tmp_path / "other"), len(writes(hub))
    with pytest.raises(HubError, match=says) as caught:
        push(other, REPO, **REFUSED_TARGETS[says])
    sentence(caught)
    assert len(writes(hub)) == before


def test_pull_request_needs_a_repository(hub, saved):
    with pytest.raises(HubError, match="no repository lab/none to open a pull request in"):
        push(saved, "lab/none", create_pr=True)
    assert not hub.repos


def test_private_repository(hub, saved):
    push(saved, REPO, private=True)
    assert hub.repos[REPO].private
    push(saved, REPO, private=True)
    push(saved, REPO)
    assert hub.repos[REPO].private


def test_organisation_decides_who_sees_a_repository_unless_it_is_asked_for(hub, saved):
    bodies = []
    hub.fault = lambda request: bodies.append(json.loads(request.body)) if "/repos/create" in request.path else None
    push(saved, "lab/a")
    push(saved, "lab/b", private=True)
    assert [body.get("visibility") for body in bodies] == [None, "private"]


def test_repository_without_a_main_branch(hub, saved):
    push(saved, REPO, branch="other")
    del hub.repos[REPO].branches["main"]
    with pytest.raises(HubError, match="has no branch main to start new from") as caught:
        push(saved, REPO, branch="new")
    sentence(caught)


def test_file_that_cannot_be_read_is_named(hub, saved, monkeypatch):
    (saved / "recipe.yaml").write_text("epochs: 1\n")
    opened = Path.open

    def refuse(path, *how, **options):
        if path.name == "recipe.yaml":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *how, **options)

    push(saved, REPO)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(HubError, match=r"recipe\.yaml cannot be used \(Permission denied\)") as caught:
        push(saved, REPO)
    sentence(caught)


# Under which license


def test_unknown_license_has_to_be_told(hub, folder):
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
    told = json.loads(hub.repos["lab/nobody-knows"].files()["config.json"])
    told["vitreg"]["provenance"].pop("doors")
    assert told == json.loads(before["config.json"])


def test_word_that_is_no_license_does_not_stay_in_the_config(hub, folder):
    saved = replace(random_bundle(), provenance=Provenance(origin="somewhere")).save(folder)
    config = json.loads((saved / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "unknown"
    (saved / "config.json").write_text(json.dumps(config))
    push(saved, REPO, license="unknown")
    assert "license" not in json.loads(hub.repos[REPO].files()["config.json"])["pretrained_cfg"]


def card_with(license: str, *, text: str = "# Mine\n") -> str:
    return f"---\nlicense: {license}\n---\n{text}"


def test_folders_card_tells_the_license_too(hub, saved):
    (saved / "README.md").write_text(card_with("cc-by-nc-4.0"))
    with pytest.raises(LicenseError, match=r"several licenses, cc-by-nc-4\.0, mit: say with --license") as caught:
        push(saved, REPO)
    sentence(caught)
    assert not hub.requests
    push(saved, REPO, license="cc-by-nc-4.0")
    files = hub.repos[REPO].files()
    assert json.loads(files["config.json"])["vitreg"]["provenance"]["license"] == "cc-by-nc-4.0"


def test_card_on_the_hub_may_not_contradict_the_weights(hub, saved, tmp_path):
    told = ModelBundle.load(saved).provenance.license
    push(saved, REPO)
    api = HfApi(endpoint=hub.endpoint, token="hf_good")
    card = hub.repos[REPO].files()["README.md"].decode()
    changed = card.replace(f"\nlicense: {told}\n", "\nlicense: cc-by-nc-4.0\n")
    assert changed != card
    api.upload_file(repo_id=REPO, path_or_fileobj=changed.encode(), path_in_repo="README.md")
    before = len(writes(hub))
    with pytest.raises(LicenseError, match="several licenses") as caught:
        push(saved, REPO)
    sentence(caught)
    assert len(writes(hub)) == before
    push(saved, REPO, license=told)
    files = hub.repos[REPO].files()
    assert ModelCard(files["README.md"].decode()).data.license == told
    assert "cc-by-nc" not in files["README.md"].decode()


def test_authors_own_card_with_another_license_has_to_be_changed_by_its_author(hub, saved):
    told = ModelBundle.load(saved).provenance.license
    api = HfApi(endpoint=hub.endpoint, token="hf_good")
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=card_with("gpl-3.0").encode(), path_in_repo="README.md")
    for license, says in ((None, "several licenses"), (told, "is its author's and states the license gpl-3.0")):
        with pytest.raises(LicenseError, match=says) as caught:
            push(saved, REPO, license=license)
        sentence(caught)
    assert len(hub.repos[REPO].commits) == 2
    unknown = replace(random_bundle(), provenance=Provenance(origin="somewhere")).save(saved.parent / "unknown")
    with pytest.raises(LicenseError, match=r"states the license gpl-3\.0: push with --license gpl-3\.0"):
        push(unknown, REPO, license="unknown")


def test_card_of_a_branch_loads_the_branch(hub, saved):
    push(saved, REPO, branch="best")
    card = hub.repos[REPO].files("best")["README.md"].decode()
    assert f'"hf-hub:{REPO}@best"' in card
    assert f'"hf-hub:{REPO}"' not in card
    assert 'revision="best"' in card
