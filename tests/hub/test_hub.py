"""Push and pull with huggingface_hub's real client, against the stand-in Hub."""

import hashlib
import re

import pytest
import timm
import torch
from hub_faults import HTML, Fault, sentence, writes
from hub_server import Drop
from huggingface_hub import HfApi, constants
from models import random_bundle
from pushers import plan, push

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.cli import main
from vitreg_hub.errors import BundleError, HubError, UnknownArchError
from vitreg_hub.hub import list_models, pull
from vitreg_hub.model_cards.card import render

REPO = "lab/vit_nano_reg4"

pytestmark = pytest.mark.usefixtures("waited")


@pytest.fixture
def saved(folder):
    return random_bundle().save(folder)


def test_push_is_one_commit_with_a_card(hub, saved):
    opened = []
    pushed = push(saved, REPO, verify=lambda folder, **_: opened.append(folder) or {})
    repo = hub.repos[REPO]
    assert opened == [saved]
    assert len(repo.commits) == 2  # the Hub's own first one, and ours
    assert pushed.commit == repo.branches["main"] == repo.commits[-1].oid
    assert pushed.url == f"{hub.endpoint}/{REPO}/commit/{pushed.commit}"
    assert (pushed.sent, pushed.pull_request) == (("README.md", "config.json", "model.safetensors"), None)
    files = repo.files()
    assert set(files) - {".gitattributes"} == {"config.json", "model.safetensors", "README.md"}
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card
    assert "ot measured" in card


def test_card_of_the_folder_is_sent_and_the_repositorys_own_kept(hub, tmp_path):
    saved = random_bundle().save(tmp_path / "first", card="# ours\n")
    push(saved, REPO)
    assert hub.repos[REPO].files()["README.md"] == b"# ours\n"
    push(random_bundle().save(tmp_path / "second", card="# other\n"), REPO)
    assert hub.repos[REPO].files()["README.md"] == b"# ours\n"


def test_card_without_a_repository_gets_the_real_one(hub, tmp_path):
    bundle = random_bundle()
    push(bundle.save(tmp_path / "quickstart", card=render(bundle)), REPO)
    card = hub.repos[REPO].files()["README.md"].decode()
    assert "your-name" not in card
    assert f'timm.create_model("hf-hub:{REPO}"' in card


def test_nothing_is_sent_of_a_folder_that_fails_a_door(hub, saved):
    (saved / "other.safetensors").write_bytes(b"weights")
    with pytest.raises(BundleError, match="R6"):
        push(saved, REPO)
    assert not hub.requests


PICKLES = ("pytorch_model.bin", "training_args.bin", "a.pt", "b.pth", "c.ckpt", "d.pkl", "e.pickle", "f.npy", "g.H5")


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_refused_by_name(hub, saved, name):
    (saved / name).write_bytes(b"pickle")
    with pytest.raises(BundleError, match=rf"holds {name}: .*only safetensors are published") as caught:
        push(saved, REPO)
    sentence(caught)
    assert not hub.requests


def test_pull_gives_the_same_files_and_works_offline(hub, saved, tmp_path, monkeypatch):
    push(saved, REPO)
    pulled = pull(REPO, tmp_path / "pulled")
    assert (pulled / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert (pulled / "config.json").read_bytes() == hub.repos[REPO].files()["config.json"]
    assert "vitreg" in (pulled / "README.md").read_text()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline = ModelBundle.load(f"hf-hub:{REPO}")
    assert offline.to_json() == ModelBundle.load(pulled).to_json()
    assert len(hub.requests) == requests


def test_revisions(hub, saved, tmp_path):
    push(saved, REPO)
    first = hub.repos[REPO].commits[-1].oid
    other = random_bundle("vit_nano_reg8").save(tmp_path / "other")
    push(other, REPO)
    assert ModelBundle.load(f"hf-hub:{REPO}").arch == "vit_nano_reg8"
    assert ModelBundle.load(f"hf-hub:{REPO}@{first}").arch == "vit_nano_reg4"
    with pytest.raises(HubError, match="no such branch, tag or commit") as caught:
        pull(f"{REPO}@nothing", tmp_path / "pulled")
    sentence(caught)
    assert not (tmp_path / "pulled").exists()


def test_pull_into_an_existing_folder_asks_nothing_of_the_hub(hub, tmp_path):
    with pytest.raises(BundleError, match="exists: choose another folder"):
        pull(REPO, tmp_path)
    assert not hub.requests


@pytest.mark.parametrize(("answer", "says"), [(403, "sending to lab/vit_nano_reg4 failed"), (500, "sending to")])
def test_upload_that_breaks_off_is_sentence(answer, says, hub, saved):
    hub.fault = lambda request: (answer, {}, b"") if request.command == "PUT" else None
    with pytest.raises(HubError, match=says) as caught:
        push(saved, REPO)
    sentence(caught)
    assert len(hub.repos[REPO].commits) == 1  # the Hub's own


def test_refused_commit_is_sentence(hub, saved):
    hub.fault = lambda request: (400, {}, b"no\nsuch\nluck") if "/commit/" in request.path else None
    with pytest.raises(HubError, match="refused the request for lab/vit_nano_reg4 with status 400") as caught:
        push(saved, REPO)
    sentence(caught)


def test_push_without_a_token(hub, saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no access token: run `hf auth login` or set HF_TOKEN") as caught:
        push(saved, REPO)
    sentence(caught)
    assert not hub.requests


@pytest.mark.parametrize(("token", "says"), [("hf_wrong", "missing or invalid"), ("hf_reader", "may not do this")])
def test_push_with_a_token_that_does_not_do(token, says, hub, saved, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=says) as caught:
        push(saved, REPO)
    sentence(caught)
    assert REPO not in hub.repos


def test_push_to_someone_elses_name(hub, saved):
    with pytest.raises(HubError, match="may not do this"):
        push(saved, "someone/model")
    with pytest.raises(HubError, match="is not a repository id"):
        push(saved, "too/many/parts")


def test_pull_of_a_missing_repository(hub, tmp_path):
    with pytest.raises(HubError, match=r"no repository lab/nothing at http://127\.0\.0\.1") as caught:
        pull("lab/nothing", tmp_path / "pulled")
    sentence(caught)


@pytest.mark.timeout(60)  # for minutes, without a look
def test_no_network(hub, saved, tmp_path):
    hub.__exit__(None, None, None)
    acts = (
        lambda: push(saved, REPO),
        lambda: plan(saved, REPO, verify=lambda *args, **kwargs: pytest.fail("it waits for the doors first")),
        lambda: pull(REPO, tmp_path / "pulled"),
        list_models,
    )
    for act in acts:
        with pytest.raises(HubError, match="cannot be reached") as caught:
            act()
        sentence(caught)


def test_dropped_download_leaves_nothing(hub, saved, tmp_path):
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
    with pytest.raises(BundleError, match=r"lab/plain is not a bundle but a timm model \(test_vit\)") as caught:
        pull("lab/plain", tmp_path / "pulled")
    sentence(caught)
    assert not [path for _, path, _ in hub.requests if path.endswith("resolve/main/model.safetensors")]


KINDS = {
    "a transformers model of type dinov2: make it one with": {"config.json": b'{"model_type": "dinov2"}', "x.bin": b""},
    "a transformers model of type bert.": {"config.json": b'{"model_type": "bert"}', "model.safetensors": b""},
    "a timm model (vit_base_patch16_224): make": {"config.json": b'{"architecture": "vit_base_patch16_224"}'},
    "an OpenCLIP model with both towers: make it": {"open_clip_config.json": b"{}", "open_clip_model.safetensors": b""},
    "a repository with the checkpoint dino.pth: make it": {"dino.pth": b""},
    "a repository of data without a model.": {"train/part.parquet": b"", "README.md": b""},
    "a repository without a model.": {},
}


@pytest.mark.parametrize("what", KINDS)
def test_repository_without_a_bundle_says_what_it_is(hub, tmp_path, what):
    api = HfApi(endpoint=hub.endpoint, token="hf_good")
    api.create_repo("lab/thing")
    for name, content in KINDS[what].items():
        api.upload_file(repo_id="lab/thing", path_or_fileobj=content or b"much", path_in_repo=name)
    asked = len(hub.requests)
    with pytest.raises(BundleError, match=re.escape(f"hf-hub:lab/thing is not a bundle but {what}")) as caught:
        pull("lab/thing", tmp_path / "pulled")
    assert ("`vitreg convert hf-hub:lab/thing FOLDER`" in sentence(caught)) == ("make" in what)
    fetched = {path.rpartition("/")[2] for verb, path, _ in hub.requests[asked:] if "/resolve/" in path}
    assert fetched <= {"config.json", "open_clip_config.json"}  # nothing large


def test_published_dinov2_weights_come_from_timms_repository(hub):
    source = timm.create_model("vit_small_patch14_reg4_dinov2")
    timm.models.push_to_hf_hub(source, "lab/source", safe_serialization=True)
    hub.repos["timm/vit_small_patch14_reg4_dinov2.lvd142m"] = hub.repos["lab/source"]
    bundle = ModelBundle.load("vit_small_reg4")
    commit = hub.repos["lab/source"].branches["main"]
    assert bundle.provenance.origin == f"weights of hf-hub:timm/vit_small_patch14_reg4_dinov2.lvd142m@{commit}"
    assert bundle.provenance.license == "apache-2.0"
    by_name = timm.create_model("vit_small_reg4", pretrained=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(bundle.state_dict[name], tensor)
        assert torch.equal(by_name.state_dict()[name], tensor)


# Without doing it


def test_plan_writes_nothing_and_says_what_a_push_does(hub, saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    (saved / "state").mkdir()
    planned = plan(saved, REPO)
    assert not writes(hub)
    assert (planned.makes_repository, planned.makes_branch, planned.license) == (True, False, "mit")
    assert planned.left_out == ("notes.txt", "state/")
    assert {file.name: file.state for file in planned.files} == {
        name: "new" for name in ("README.md", "config.json", "model.safetensors")
    }
    push(saved, REPO)
    for file in planned.files:
        assert file.size == len(hub.repos[REPO].files()[file.name])
    other, before = random_bundle("vit_nano_reg8").save(tmp_path / "other"), len(writes(hub))
    (other / "recipe.yaml").write_text("epochs: 1")
    planned = plan(other, REPO, branch="best")
    assert (planned.makes_repository, planned.makes_branch) == (False, True)
    assert {file.name: file.state for file in planned.files} == {
        "README.md": "changed",
        "config.json": "changed",
        "model.safetensors": "changed",
        "recipe.yaml": "new",
    }
    assert {file.state for file in plan(saved, REPO).files} == {"unchanged"}
    assert len(writes(hub)) == before
    assert hub.repos[REPO].branches.keys() == {"main"}


# Finding them


def test_published_models_are_found_by_their_tag(hub, tmp_path, capsys):
    for arch in ("vit_nano_reg4", "vit_nano_reg8"):
        push(random_bundle(arch).save(tmp_path / arch), f"lab/{arch}", private=arch == "vit_nano_reg8")
    HfApi(endpoint=hub.endpoint, token="hf_good").create_repo("lab/empty")
    hub.repos["lab/vit_nano_reg8"].downloads = 12
    found = list_models()
    assert [model.repo_id for model in found] == ["lab/vit_nano_reg8", "lab/vit_nano_reg4"]
    assert (found[0].license, found[0].downloads, found[0].private) == ("mit", 12, True)
    assert "vit_nano_reg8" in found[0].tags
    assert found[0].last_modified is not None
    assert [model.repo_id for model in list_models(arch="vit_nano_reg4")] == ["lab/vit_nano_reg4"]
    assert [model.repo_id for model in list_models(search="reg8", author="lab", limit=1)] == ["lab/vit_nano_reg8"]
    assert [model.repo_id for model in list_models(limit=1)] == ["lab/vit_nano_reg8"]
    assert list_models(author="bob") == ()
    with pytest.raises(UnknownArchError):
        list_models(arch="vit_nano_reg5")
    main(["list", "--hub", "*reg4"])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["repository", "architecture", "license", "downloads", "likes", "updated"]
    assert row.split()[:5] == ["lab/vit_nano_reg4", "vit_nano_reg4", "mit", "0", "0"]
    with pytest.raises(SystemExit, match="none of the 2 published models matches 'other'"):
        main(["list", "--hub", "other"])


def test_listing_of_what_is_no_hub(hub):
    hub.fault = Fault(method="GET", path="/api/models", act=200, body=HTML).on(hub)
    with pytest.raises(HubError, match="does not answer like a Hub") as caught:
        list_models()
    sentence(caught)
    hub.fault = Fault(method="GET", path="/api/models", act=200, body=HTML, times=1).on(hub)
    assert list_models() == ()


# The command


def test_command_prints_the_commit_last(hub, saved, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vitreg_hub.hub.publish.plan", plan)
    monkeypatch.setattr("vitreg_hub.hub.publish.push", push)
    main(["push", str(saved), REPO, "--dry-run"])
    assert not hub.repos
    shown = capsys.readouterr().out
    assert f"{REPO}, branch main (new), license mit" in shown
    size = f"{(saved / 'model.safetensors').stat().st_size:,} bytes"
    assert re.search(rf"new +{size}  model\.safetensors", shown)
    main(["push", str(saved), REPO, "--branch", "best", "--tag", "v1", "--private", "--license", "mit"])
    repo = hub.repos[REPO]
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/{REPO}/commit/{repo.branches['best']}"
    assert repo.tags == {"v1": repo.branches["best"]}
    assert repo.private
    main(["push", str(saved), REPO, "--create-pr"])
    *_, request, commit = capsys.readouterr().out.splitlines()
    assert request == f"pull request {hub.endpoint}/{REPO}/discussions/1"
    assert commit.endswith(repo.pull_requests["refs/pr/1"])
    main(["pull", f"{REPO}@v1", str(tmp_path / "pulled")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "pulled")
    weights = (tmp_path / "pulled" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).digest() == hashlib.sha256((saved / "model.safetensors").read_bytes()).digest()
