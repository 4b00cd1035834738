"""The stand-in Hub, seen through the real `huggingface_hub` client."""

import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from hub_server import Blob, Drop, HubServer, User
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "lab/vit"
TOKENS = {
    "hf_good": User("alice", orgs=("lab",)),
    "hf_reader": User("alice", ("lab",), read_only=True),
    "hf_bob": "bob",
}
WEIGHTS = random.Random(0).randbytes(2**20)
FOLDER = {"README.md": b"---\nlicense: mit\n---\n# ViT\n", "config.json": b"{}", "model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HubServer(TOKENS) as server:
        yield server


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token="hf_good")


@pytest.fixture
def model_folder(tmp_path):
    for name, content in FOLDER.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


@pytest.fixture
def published(api, model_folder):
    """The commit of `FOLDER` to a new repository."""
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=model_folder)


def fetch(url, method="GET", data=None, **headers):
    """Sends one plain HTTP request; returns the status, the headers and the body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=10) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def run_client(script, tmp_path, env):
    """Runs `script` in a fresh process whose caches lie below `tmp_path`; returns what it prints as JSON."""
    env = {**os.environ, **env, "HF_HOME": str(tmp_path / "home")}
    output = subprocess.run([sys.executable, "-c", script], env=env, check=True, stdout=subprocess.PIPE, timeout=120)
    return json.loads(output.stdout)


def requested(hub, method, part):
    return [entry for entry in hub.requests if entry[0] == method and part in entry[1]]


def test_upload_folder_is_one_commit(hub, api, published):
    initial, commit = hub.repos[REPO].commits
    assert (commit.oid, commit.parent) == (published.oid, initial.oid)
    assert hub.repos[REPO].branches == {"main": published.oid}
    assert hub.repos[REPO].files() == {**hub.repos[REPO].files(initial.oid), **FOLDER}
    assert [path for path, blob in commit.files.items() if blob.lfs] == ["model.safetensors"]
    assert [status for *_, status in requested(hub, "PUT", "/lfs/")] == [200]
    assert len(requested(hub, "POST", f"/lfs/{REPO}/")) == 1
    assert published.repo_url == f"{hub.endpoint}/{REPO}"


def test_unchanged_files_are_not_sent_again(hub, api, published, model_folder):
    again = api.upload_folder(repo_id=REPO, folder_path=model_folder)
    assert again.oid == published.oid
    assert len(hub.repos[REPO].commits) == 2
    (model_folder / "copy.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    assert hub.repos[REPO].files()["copy.safetensors"] == WEIGHTS
    assert len(requested(hub, "PUT", "/lfs/")) == 1


def test_listings_describe_the_files(hub, api, published):
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    info = api.model_info(REPO, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert info.sha == published.oid
    assert (files["model.safetensors"].lfs.sha256, files["model.safetensors"].size) == (sha256, len(WEIGHTS))
    # What `printf '{}' | git hash-object --stdin` prints.
    assert files["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert api.model_info(REPO).siblings[0].size is None
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *FOLDER}
    assert {entry.path: entry.blob_id for entry in api.list_repo_tree(REPO)} == {k: f.blob_id for k, f in files.items()}


def test_tree_of_a_folder(hub, api, published):
    api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a/b/c.txt")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"2", path_in_repo="a/d.txt")
    assert [entry.path for entry in api.list_repo_tree(REPO, "a")] == ["a/d.txt"]
    assert {entry.path for entry in api.list_repo_tree(REPO, "a", recursive=True)} == {"a/b/c.txt", "a/d.txt"}
    assert "a/d.txt" not in {entry.path for entry in api.list_repo_tree(REPO)}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))


def test_existing_things_are_found(hub, api, published):
    assert [api.repo_exists(repo) for repo in (REPO, "lab/none")] == [True, False]
    assert [api.file_exists(REPO, path) for path in ("config.json", "none.json")] == [True, False]
    assert [api.revision_exists(REPO, revision) for revision in (published.oid, "none")] == [True, False]
    user = api.whoami()
    assert (user["name"], [org["name"] for org in user["orgs"]]) == ("alice", ["lab"])


def test_creating_a_repository_again(hub, api, published):
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert api.create_repo("own").repo_id == "alice/own"


def test_download_then_work_offline(hub, published, tmp_path):
    script = f"""
import hashlib, json, pathlib
from huggingface_hub import hf_hub_download, snapshot_download
file = pathlib.Path(hf_hub_download("{REPO}", "model.safetensors"))
snapshot = pathlib.Path(snapshot_download("{REPO}"))
hashes = {{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [*snapshot.iterdir(), file]}}
print(json.dumps([snapshot.name, file.resolve().name, hashes]))
"""
    online = run_client(script, tmp_path, hub.env())
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in hub.repos[REPO].files().items()}
    assert online == [published.oid, hashes["model.safetensors"], hashes]
    answered = len(hub.requests)
    assert run_client(script, tmp_path, hub.env() | {"HF_HUB_OFFLINE": "1"}) == online
    assert len(hub.requests) == answered


def test_environment_carries_the_token(hub, tmp_path):
    script = "import json, huggingface_hub; print(json.dumps(huggingface_hub.whoami()['name']))"
    assert run_client(script, tmp_path, hub.env("hf_bob")) == "bob"


def test_stale_parent_commit_is_refused(hub, api, published):
    parent = hub.repos[REPO].commits[0].oid
    with pytest.raises(HfHubHTTPError) as refused:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert len(hub.repos[REPO].commits) == 2
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", parent_commit=published.oid[:7])
    assert hub.repos[REPO].files()["x.txt"] == b"x"


def test_revisions(hub, api, published, tmp_path):
    repo = hub.repos[REPO]
    repo.tags["v1"] = repo.branches["dev/next"] = published.oid
    commit = api.upload_file(repo_id=REPO, path_or_fileobj=b"[]", path_in_repo="config.json", revision="dev/next")
    assert repo.branches == {"main": published.oid, "dev/next": commit.oid}
    for revision, content in {"v1": "{}", "main": "{}", "dev/next": "[]", commit.oid: "[]"}.items():
        path = api.hf_hub_download(REPO, "config.json", revision=revision, cache_dir=tmp_path / "cache")
        with open(path) as file:
            assert file.read() == content
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", revision="v1")


def test_branches_and_tags_are_made_once(hub, api, published):
    api.create_branch(REPO, branch="dev/next")
    api.create_branch(REPO, branch="first", revision=hub.repos[REPO].commits[0].oid)
    api.create_tag(REPO, tag="v1", revision="dev/next")
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": published.oid,
        "dev/next": published.oid,
        "first": hub.repos[REPO].commits[0].oid,
    }
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", published.oid)]
    for again in (lambda: api.create_branch(REPO, branch="first"), lambda: api.create_tag(REPO, tag="v1")):
        with pytest.raises(HfHubHTTPError) as refused:
            again()
        assert refused.value.response.status_code == 409
    api.create_branch(REPO, branch="first", exist_ok=True)
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v2", revision="none")
    with pytest.raises(BadRequestError):
        api.create_branch(REPO, branch="refs/pr/5")


def test_history_of_a_branch_is_listed_in_pages(hub, api, published, monkeypatch):
    monkeypatch.setattr("hub_server.COMMITS_A_PAGE", 2)
    api.create_branch(REPO, branch="old")
    for number in range(3):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"%d" % number, path_in_repo="x.txt", commit_message=f"{number}")
    titles = [commit.title for commit in api.list_repo_commits(REPO)]
    assert titles == ["2", "1", "0", "Upload folder using huggingface_hub", "initial commit"]
    assert next(commit.commit_id for commit in api.list_repo_commits(REPO, revision="old")) == published.oid
    assert len(requested(hub, "GET", "/commits/main")) == 3


def test_anyone_may_open_a_pull_request(hub, published):
    bob = HfApi(endpoint=hub.endpoint, token="hf_bob")
    info = bob.upload_file(repo_id=REPO, path_or_fileobj=b"new", path_in_repo="new.bin", create_pr=True)
    assert (info.pr_url, info.pr_revision) == (f"{hub.endpoint}/{REPO}/discussions/1", "refs/pr/1")
    assert hub.repos[REPO].branches == {"main": published.oid}
    assert hub.repos[REPO].files("refs/pr/1")["new.bin"] == b"new"
    refs = bob.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", info.oid)]
    reader = HfApi(endpoint=hub.endpoint, token="hf_reader")
    with pytest.raises(HfHubHTTPError) as refused:
        reader.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt", create_pr=True)
    assert refused.value.response.status_code == 403


def test_models_are_found_by_tag_author_and_name(hub, api, published):
    card = b"---\nlicense: mit\nlibrary_name: timm\ntags: [registers, tiny]\n---\n# other\n"
    for repo, private in (("lab/other", False), ("alice/secret", True)):
        api.create_repo(repo, private=private)
        api.upload_file(repo_id=repo, path_or_fileobj=card, path_in_repo="README.md")
    hub.repos["lab/other"].downloads = 7

    def found(who=api, **how):
        return [model.id for model in who.list_models(**how)]

    assert found() == [REPO, "lab/other", "alice/secret"]
    assert found(filter=["registers", "tiny"]) == ["lab/other", "alice/secret"]
    assert found(filter=["registers", "huge"]) == []
    assert found(filter="license:mit", author="lab") == [REPO, "lab/other"]
    assert found(search="OTH") == ["lab/other"]
    assert found(sort="downloads", limit=1) == ["lab/other"]
    assert found(HfApi(endpoint=hub.endpoint, token="hf_bob"), filter="registers") == ["lab/other"]
    (model,) = api.list_models(search="other", expand=["tags", "downloads", "lastModified"])
    assert (model.tags, model.downloads) == (["registers", "tiny", "license:mit", "timm"], 7)
    assert model.last_modified is not None
    assert (model.private, model.likes) == (None, None)  # not asked for


def test_delete_file(hub, api, published):
    api.delete_file("config.json", REPO)
    assert "config.json" not in hub.repos[REPO].files()
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", REPO)


def test_gitignore_is_honoured(hub, api, published, model_folder):
    (model_folder / ".gitignore").write_text("*.log\n")
    (model_folder / "run.log").write_text("noise")
    api.upload_folder(repo_id=REPO, folder_path=model_folder)
    assert hub.repos[REPO].files().keys() == {".gitattributes", ".gitignore", *FOLDER}


def test_gitignore_of_the_repository_is_honoured(hub, api, published):
    for name, content in ((".gitignore", b"# large\n*.safetensors\n"), ("model.safetensors", b"new"), ("x.txt", b"x")):
        api.upload_file(repo_id=REPO, path_or_fileobj=content, path_in_repo=name)
    files = hub.repos[REPO].files()
    assert (files["model.safetensors"], files["x.txt"]) == (WEIGHTS, b"x")


def test_card_that_is_no_yaml(hub, api, published):
    broken = b"---\nlicense: [mit\n---\n"
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(repo_id=REPO, path_or_fileobj=broken, path_in_repo="README.md")
    repo = hub.repos[REPO]
    repo.commit("main", "by Git", {**repo.resolve("main").files, "README.md": Blob(broken)})
    assert [model.tags for model in api.list_models()] == [[]]


@pytest.mark.parametrize(
    ("token", "error", "status"),
    [
        (False, RepositoryNotFoundError, 401),
        ("hf_wrong", HfHubHTTPError, 401),
        ("hf_reader", HfHubHTTPError, 403),
        ("hf_bob", HfHubHTTPError, 403),
    ],
)
def test_writing_takes_the_right_token(hub, published, model_folder, token, error, status):
    stranger = HfApi(endpoint=hub.endpoint, token=token)
    with pytest.raises(error) as refused:
        stranger.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x.txt")
    assert (type(refused.value), refused.value.response.status_code) == (error, status)
    with pytest.raises(HfHubHTTPError) as refused:
        stranger.create_repo("lab/new")
    assert (type(refused.value), refused.value.response.status_code) == (HfHubHTTPError, status)
    assert hub.repos.keys() == {REPO}
    assert len(hub.repos[REPO].commits) == 2


def test_private_repositories_are_hidden(hub, api):
    api.create_repo("lab/secret", private=True)
    assert api.model_info("lab/secret").private
    for token, status in {False: 401, "hf_bob": 404}.items():
        with pytest.raises(RepositoryNotFoundError) as refused:
            HfApi(endpoint=hub.endpoint, token=token).model_info("lab/secret")
        assert refused.value.response.status_code == status


def test_missing_things_raise_the_typed_errors(hub, api, published, tmp_path):
    download = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("lab/none", "config.json", **download)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="none", **download)
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(REPO, "none.json", **download)
    with pytest.raises(RepositoryNotFoundError):
        api.snapshot_download("lab/none", **download)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="none")


def test_resolve_serves_headers_and_ranges(hub, published):
    url = f"{hub.endpoint}/{REPO}/resolve/main/model.safetensors"
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    status, headers, body = fetch(url, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(WEIGHTS)))
    assert (headers["ETag"], headers["X-Repo-Commit"]) == (f'"{sha256}"', published.oid)
    for wanted, part in {"5-9": WEIGHTS[5:10], "0-0": WEIGHTS[:1], f"{2**20 - 3}-": WEIGHTS[-3:]}.items():
        status, headers, body = fetch(url, Range=f"bytes={wanted}")
        assert (status, body) == (206, part)
    assert headers["Content-Range"] == f"bytes {2**20 - 3}-{2**20 - 1}/{2**20}"
    status, headers, body = fetch(url, Range=f"bytes={2**20}-")
    assert (status, headers["Content-Range"]) == (416, f"bytes */{2**20}")


def test_wrong_lfs_content_is_refused(hub, published):
    def commit(size):
        change = {"path": "x.bin", "algo": "sha256", "oid": oid, "size": size}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": change}]
        body = "\n".join(map(json.dumps, lines)).encode()
        return fetch(f"{hub.endpoint}/api/models/{REPO}/commit/main", "POST", body, Authorization="Bearer hf_good")[0]

    oid = hashlib.sha256(b"right").hexdigest()
    upload = f"{hub.endpoint}/lfs/{REPO}/{oid}"
    assert fetch(upload, "PUT", b"wrong")[0] == 400
    assert commit(size=5) == 400
    assert fetch(upload, "PUT", b"right")[0] == 200
    assert commit(size=6) == 400
    assert len(hub.repos[REPO].commits) == 2
    assert commit(size=5) == 200
    assert hub.repos[REPO].files()["x.bin"] == b"right"


def test_a_commit_with_a_refused_part_changes_nothing(hub, api, published):
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationAdd("new.bin", b"new")]
    hub.fault = lambda request: (200, {}, b"{}") if request.path.startswith("/lfs/") else None
    with pytest.raises(BadRequestError):
        api.create_commit(REPO, operations, commit_message="An upload gets lost")
    assert hub.repos[REPO].files().keys() == {".gitattributes", *FOLDER}
    assert len(hub.repos[REPO].commits) == 2


def test_a_lost_upload_fails_its_verification(hub, api, published):
    hub.fault = lambda request: (200, {}, b"") if request.command == "PUT" else None
    with pytest.raises(RuntimeError, match=r"Error while uploading 'new\.bin'") as failure:
        api.upload_file(repo_id=REPO, path_or_fileobj=b"new", path_in_repo="new.bin")
    assert isinstance(failure.value.__cause__, BadRequestError)


def test_a_download_that_breaks_off_is_resumed(hub, api, published, tmp_path, monkeypatch):
    # The client resumes after the last whole chunk that it got, and a chunk has 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)

    def cut_unless_resumed(request):
        if request.command == "GET" and "Range" not in request.headers:
            return 200, {"Content-Length": str(len(WEIGHTS))}, WEIGHTS[:500_000]

    hub.fault = cut_unless_resumed
    path = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == WEIGHTS
    assert [status for *_, status in requested(hub, "GET", "/resolve/")] == [200, 206]


def test_a_dropped_request_is_sent_again(hub, api, published):
    def drop_first(request):
        if not requested(hub, "GET", "/tree/"):
            raise Drop

    hub.fault = drop_first
    assert "config.json" in api.list_repo_files(REPO)
    assert [status for *_, status in requested(hub, "GET", "/tree/")] == [0, 200]


def test_blob_ids_are_those_of_git():
    # What `git hash-object --stdin` prints for the content and for the pointer to it.
    assert Blob(b"hello\n").metadata["oid"] == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert Blob(b"hello\n", lfs=True).metadata["oid"] == "fa61e1ef71c9908c0926776a4aa3504b3a27f159"


def test_timm_and_transformers_publish_and_load(hub, tmp_path):
    script = """
import json, timm, torch
from timm.models import push_to_hf_hub
from transformers import AutoModel, ViTConfig, ViTModel

def same(ours, theirs):
    return all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())

timm_model = timm.create_model("test_vit")
push_to_hf_hub(timm_model, "lab/timm")
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
model = ViTModel(config)
model.push_to_hub("lab/transformers")
loaded = timm.create_model("hf-hub:lab/timm", pretrained=True), AutoModel.from_pretrained("lab/transformers")
print(json.dumps([same(timm_model, loaded[0]), same(model, loaded[1])]))
"""
    assert run_client(script, tmp_path, hub.env("hf_good")) == [True, True]
    assert [len(repo.commits) for repo in hub.repos.values()] == [2, 2]
