"""Pulls that go wrong: the folder is whole or not there, the cache is sound, and one sentence says why."""

import errno
import hashlib
import json
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub as hf
import pytest
from hub_faults import ALWAYS, DROP, HTML, Fault, sentence
from hub_state import Blob, User
from huggingface_hub import constants
from pushers import push

from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.checkpoint.opening import open_checkpoint
from vitreg_hub.errors import BundleError, HubError, HubRefusedError, VitregError
from vitreg_hub.files import checksum
from vitreg_hub.hub import list_models, plan, pull
from vitreg_hub.remote.download import download

REPO = "lab/model"
SAVED = ("README.md", "config.json", "model.safetensors")

pytestmark = pytest.mark.usefixtures("waited")


# Who may read what

PULLERS = {
    "a missing repository": ("lab/none", "hf_good", "no repository lab/none at .*check the name"),
    "a missing revision": (f"{REPO}@none", "hf_good", "lab/model has no such branch, tag or commit"),
    "a private one without a token": ("lab/secret", "", "no repository lab/secret .*private.*hf auth login"),
    "a private one of others": ("lab/secret", "hf_bob", "no repository lab/secret .*private.*hf auth login"),
    "a wrong token": (REPO, "hf_wrong", "access token for lab/model is missing or invalid"),
    "a gated one": ("lab/gated", "hf_good", "lab/gated is gated: ask for access at .*/lab/gated"),
    "no name": ("a/b/c", "hf_good", "'a/b/c' is not a repository id"),
    "no revision": (f"{REPO}@", "hf_good", "lab/model@ has nothing after the @: add a branch, tag or commit"),
    "no token at all": (REPO, "hf_gü", "the access token has characters that no token has: run `hf auth login`"),
}


@pytest.mark.parametrize("what", PULLERS)
def test_pull_without_permission(hub, published, old, monkeypatch, tmp_path, what):
    name, token, says = PULLERS[what]
    push(old, "lab/secret", private=True)
    push(old, "lab/gated")
    hub.tokens["hf_bob"] = User("bob")
    monkeypatch.setenv("HF_TOKEN", token)
    # The Hub shows a gated repository's listing to everyone, and its files to those who have asked for access.
    gated = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b""
    hub.fault = lambda request: gated if "lab/gated/resolve" in request.path else None
    with pytest.raises(HubError, match=says) as caught:
        pull(name, tmp_path / "pulled")
    sentence(caught)
    require_nothing(tmp_path)


# Old and new versions


def require_refused(tmp_path, says):
    """Neither files nor facts of the cached version are given."""
    for act in (lambda: pull(REPO, tmp_path / "pulled"), lambda: describe(f"hf-hub:{REPO}")):
        with pytest.raises(HubError, match=says) as caught:
            act()
        sentence(caught)
    require_nothing(tmp_path)


NO_LONGER = {
    "a wrong token": (lambda hub: hub.tokens.pop("hf_good"), "access token for lab/model is missing or invalid"),
    "a private one of others": (lambda hub: hub.tokens.update(hf_good=User("bob")), "no repository lab/model at"),
    "deleted": (lambda hub: hub.repos.pop(REPO), "no repository lab/model at"),
}


@pytest.mark.parametrize("what", NO_LONGER)
def test_cache_is_no_way_round_a_hub_that_refuses(hub, published, new, tmp_path, what):
    download(REPO)
    push(new, REPO)
    change, says = NO_LONGER[what]
    hub.repos[REPO].private = True
    change(hub)
    require_refused(tmp_path, says)


def test_cache_of_a_branch_that_is_gone(hub, published, tmp_path):
    hub.repos[REPO].branches["best"] = published
    download(f"{REPO}@best")
    del hub.repos[REPO].branches["best"]
    with pytest.raises(HubError, match="lab/model has no such branch, tag or commit"):
        download(f"{REPO}@best")


def own_records(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("vitreg_hub")]


@pytest.mark.parametrize("act", [503, 429, DROP])
def test_cache_stands_in_for_a_hub_that_does_not_answer_and_says_so(hub, published, new, tmp_path, caplog, act):
    download(REPO)
    push(new, REPO)
    hub.fault = Fault(method="GET", path="/", act=act).on(hub)
    before = len(hub.requests)
    folder = pull(REPO, tmp_path / "pulled")
    assert ModelBundle.load(folder).arch == "vit_nano_reg4"
    assert len(hub.requests) > before + 3  # it was asked more than once
    says = [f"lab/model: the Hub does not answer, so this is the cached commit {published}."]
    assert own_records(caplog) == says
    assert "vit_nano_reg4" in str(describe(f"hf-hub:{REPO}"))
    assert own_records(caplog) == says * 2


def test_offline_cache_is_what_was_asked_for(hub, published, new, monkeypatch, caplog):
    download(REPO)
    push(new, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO).name == published
    assert not own_records(caplog)


def test_hub_that_fails_once_the_head_is_known(hub, published, new, tmp_path):
    download(REPO)
    push(new, REPO)
    heads = []

    def fault(request):
        heads.append(request.path)
        return (503, {}, b"") if len(heads) > 1 else None

    hub.fault = fault
    with pytest.raises(HubError, match="status 503"):
        pull(REPO, tmp_path / "pulled")


# Downloads


def blobs() -> dict[str, bytes]:
    """What the cache holds of the repository's files, by name."""
    cache = Path(constants.HF_HUB_CACHE)
    return {path.name: path.read_bytes() for path in cache.glob("models--*/blobs/*")}


def require_sound_cache():
    """Every cached file is whole: it has the checksum by which it is called, and no half of another lies beside it."""
    for name, content in blobs().items():
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        assert name in (git, hashlib.sha256(content).hexdigest())


def require_nothing(tmp_path):
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    require_sound_cache()


def require_pulled(hub, folder):
    files = hub.repos[REPO].files()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: files[name] for name in SAVED}
    require_sound_cache()


def with_weights(act, *, times=ALWAYS):
    """A fault that happens to so many requests for weights."""
    left = times

    def fault(hub):
        def hook(request):
            nonlocal left
            if request.command == "GET" and request.path.endswith("/model.safetensors") and left:
                left -= 1
                return act(hub, request)
            return None

        return hook

    return fault


def cut(hub, request):
    """A body that ends too early; the client asks for the rest in a range."""
    status, headers, body = hub.respond(request)
    return status, {**headers, "Content-Length": str(len(body))}, [body[: len(body) // 2]]


def slow(hub, request):
    """An answer that does not come in time."""
    threading.Event().wait(0.3)


def spoiled(hub, request):
    """A body of the right size that is not that of the listing."""
    status, headers, body = hub.respond(request)
    return status, headers, body[:-1] + bytes([body[-1] ^ 1])


WEIGHTS = dict(method="GET", path="/model.safetensors")
DOWNLOADED = {
    "the weights are cut": with_weights(cut, times=1),
    "the weights are cut again and again": with_weights(cut, times=4),
    "the weights do not come in time": with_weights(slow, times=1),
    "the weights are dropped": Fault(**WEIGHTS, act=DROP, times=3).on,
    "the weights fail after the listing": Fault(**WEIGHTS, act=503, times=2).on,
    "the weights' size fails after the listing": Fault(method="HEAD", path="/model.safetensors", act=500, times=2).on,
    "the config fails for a moment": Fault(method="GET", path="/config.json", act=500, times=2).on,
    "the head fails for a moment": Fault(method="GET", path="/revision/main", act=503, times=2).on,
    "the listing fails for a moment": Fault(method="GET", path="/tree/", act=502, times=2).on,
    "too many downloads for a moment": Fault(**WEIGHTS, act=429, times=2).on,
    "the head is another's for a moment": Fault(method="GET", path="/revision/main", act=200, body=HTML, times=1).on,
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)


@pytest.mark.parametrize("what", DOWNLOADED)
def test_pull_gets_over(hub, published, tmp_path, impatient, what):
    hub.fault = DOWNLOADED[what](hub)
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))


NOT_DOWNLOADED = {
    "the weights are always cut": (with_weights(cut), "cannot be reached"),
    "the weights never come": (with_weights(slow), "cannot be reached .*Timeout"),
    "the weights always fail": (Fault(**WEIGHTS, act=503).on, "status 503 .*try again later"),
    "the head always fails": (Fault(method="GET", path="/revision/main", act=500).on, "status 500 .*try again"),
    "the listing always fails": (Fault(method="GET", path="/tree/", act=503).on, "status 503 .*try again later"),
    "the head is another's": (
        Fault(method="GET", path="/revision/main", act=200, body=HTML).on,
        "does not answer like a Hub",
    ),
    "files are another's": (
        Fault(method="HEAD", path="/resolve/", act=200, body=HTML).on,
        "does not answer like a Hub",
    ),
    "the weights are not the listing's": (
        with_weights(spoiled),
        "was fetched twice, and twice its checksum was wrong",
    ),
}


@pytest.mark.parametrize("what", NOT_DOWNLOADED)
def test_pull_gives_up_and_leaves_nothing(hub, published, tmp_path, impatient, what):
    fault, says = NOT_DOWNLOADED[what]
    hub.fault = fault(hub)
    with pytest.raises(HubError, match=says) as caught:
        pull(REPO, tmp_path / "pulled")
    sentence(caught)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}
    require_sound_cache()
    hub.fault = lambda request: None
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))


@pytest.mark.parametrize(("verb", "path"), [("GET", "/revision/main"), ("GET", "/tree/"), ("GET", "/config.json")])
def test_hub_that_forbids_to_read_has_refused(hub, published, tmp_path, path, verb):
    """A script that is told that the Hub failed would try again for ever."""
    hub.fault = Fault(method=verb, path=path, act=403).on(hub)
    with pytest.raises(
        HubRefusedError, match=r"^the access token may not do this with lab/model.*: use a token that may read it"
    ):
        pull(REPO, tmp_path / "pulled")


@pytest.mark.parametrize("body", [b'{"error": "moved"}', b"[]", b'"x"', b"null", b"3", b'[{"error": 1}]'])
@pytest.mark.parametrize("status", [200, 301])
def test_server_that_answers_other_json(hub, old, published, tmp_path, status, body):
    hub.fault = lambda request: (status, {"Content-Type": "application/json"}, body)
    acts = [lambda: pull(REPO, tmp_path / "pulled"), lambda: plan(old, REPO, verify=lambda *args, **kwargs: {})]
    for act in acts + [list_models] * (body != b"[]"):  # a list of no models is one
        with pytest.raises(VitregError) as caught:
            act()
        sentence(caught)
    require_nothing(tmp_path)


def damage(commit, name):
    snapshot = Path(constants.HF_HUB_CACHE, "models--lab--model", "snapshots", commit)
    blob = (snapshot / name).resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize("name", SAVED)
def test_damage_in_the_cache_is_mended_or_told(hub, published, tmp_path, monkeypatch, name):
    pull(REPO, tmp_path / "first")
    damage(published, name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=rf"{name} of lab/model is damaged in the cache, and .* check the n") as caught:
        ModelBundle.load(f"hf-hub:{REPO}")
    sentence(caught)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    require_pulled(hub, pull(REPO, tmp_path / "second"))


@pytest.mark.parametrize("name", SAVED)
def test_damage_in_a_cache_without_links(hub, published, tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda folder: False)
    folder = download(REPO)
    assert not any(path.is_symlink() for path in folder.iterdir())
    damage(published, name)
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))
    assert (folder / name).read_bytes() == hub.repos[REPO].files()[name]


def test_damage_that_another_process_deletes_first(hub, published, monkeypatch):
    hub.fault = with_weights(spoiled)(hub)
    times = []

    def checked(content, *, like):
        found = checksum(content, like=like)
        if Path(content).name == "model.safetensors":
            times.append(content)
            if len(times) == 2:
                Path(content).resolve().unlink()
        return found

    monkeypatch.setattr("vitreg_hub.remote.download.checksum", checked)
    with pytest.raises(HubError, match="was fetched twice, and twice its checksum was wrong"):
        download(REPO)
    require_sound_cache()


@pytest.mark.parametrize("like", ["0" * 40, "0" * 64])
def test_checksum_reads_large_files_in_parts(tmp_path, monkeypatch, like):
    content = b"much" * 100_000
    (tmp_path / "file").write_bytes(content)
    monkeypatch.delattr(Path, "read_bytes")
    expected = Blob(content, lfs=len(like) == 64).etag
    assert checksum(tmp_path / "file", like=like) == checksum(content, like=like) == expected


SHARDS = {
    "*": "which is not beside it",
    "video.*": "which is not beside it",
    "../../../../outside.safetensors": "which is not beside it",
}


@pytest.mark.parametrize("shard", SHARDS)
def test_index_of_a_stranger(hub, shard):
    api = hf.HfApi(endpoint=hub.endpoint, token="hf_good")
    api.create_repo("lab/x")
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    for name, content in {"model.safetensors.index.json": index, "video.mp4": b"x", "data/a.dat": b"x"}.items():
        api.upload_file(repo_id="lab/x", path_or_fileobj=content, path_in_repo=name)
    with pytest.raises(VitregError, match=rf"names the shard {re.escape(repr(shard))}, {SHARDS[shard]}"):
        open_checkpoint("hf-hub:lab/x")
    fetched = {path.rpartition("/")[2] for verb, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == {"model.safetensors.index.json"}


def by_xet(hub, commit, token):
    """A fault by which the weights come from Xet, to which this is the Hub's token."""
    route = f"/api/models/{REPO}/xet-read-token/{commit}"

    def hook(request):
        if request.path == route:
            return token
        if request.path.endswith("/model.safetensors"):
            status, headers, body = hub.respond(request)
            return status, {**headers, "X-Xet-Hash": "a" * 64, "Link": f'<{hub.endpoint}{route}>; rel="xet-auth"'}, body
        return None

    return hook


def test_download_by_xet_that_breaks_off(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    expires = int(time.time()) + 3600
    storage = {"X-Xet-Cas-Url": f"{hub.endpoint}/no-storage", "X-Xet-Access-Token": "x"}
    hub.fault = by_xet(hub, published, (200, {**storage, "X-Xet-Token-Expiration": str(expires)}, b"{}"))
    with pytest.raises(HubError, match=r"fetching failed .*404.*: try again, or set HF_HUB_DISABLE_XET=1") as caught:
        pull(REPO, tmp_path / "pulled")
    sentence(caught)
    require_nothing(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))


def test_damaged_card_in_the_cache_does_not_get_to_the_hub(hub, published, new, tmp_path):
    pull(REPO, tmp_path / "pulled")
    damage(published, "README.md")
    before = hub.repos[REPO].files()["README.md"].decode()
    push(new, REPO)
    after = hub.repos[REPO].files()["README.md"].decode()
    assert "\0" not in after
    assert after.partition("<!--")[0].count("\n") == before.partition("<!--")[0].count("\n")


def test_part_of_a_snapshot_without_its_listing(hub, published, tmp_path, monkeypatch):
    # As timm or AutoConfig leave it. `snapshot_download` takes it for all there is when the Hub fails.
    hf.hf_hub_download(REPO, "config.json")
    hub.fault = lambda request: (503, {}, b"")
    with pytest.raises(HubError, match="status 503") as caught:
        pull(REPO, tmp_path / "pulled")
    sentence(caught)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="lab/model is not in the cache: check the network or HF_HUB_OFFLINE") as caught:
        ModelBundle.load(f"hf-hub:{REPO}")
    sentence(caught)
    require_nothing(tmp_path)


def test_part_of_a_snapshot_with_its_listing(hub, published, tmp_path, monkeypatch):
    hf.snapshot_download(REPO, allow_patterns=["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"lab/model .*in the cache: check the network or HF_HUB_OFFLINE") as caught:
        ModelBundle.load(f"hf-hub:{REPO}")
    sentence(caught)


def test_offline_without_a_cache(hub, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{published}"):
        with pytest.raises(HubError, match="lab/model is not in the cache: check the network or HF_HUB_OFF") as caught:
            ModelBundle.load(name)
        sentence(caught)


def test_offline_nothing_is_pushed_or_listed(hub, published, new, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (lambda: push(new, REPO), list_models):
        with pytest.raises(HubError, match=r"cannot be reached .*HF_HUB_OFFLINE") as caught:
            act()
        sentence(caught)


# Disks


@pytest.mark.parametrize("home", ["file", "/proc/none"])
def test_cache_where_no_folder_can_be(hub, published, tmp_path, monkeypatch, home):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / home / "hub"))
    with pytest.raises(HubError, match=r"cache of the Hub at .*hub cannot be written .* set HF_HOME") as caught:
        pull(REPO, tmp_path / "pulled")
    sentence(caught)
    assert not (tmp_path / "pulled").exists()


def no_room(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_cache_on_a_full_disk(hub, published, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", no_room)
        with pytest.raises(HubError, match=r"cannot be written \(No space left on device\): make room") as caught:
            pull(REPO, tmp_path / "pulled")
    sentence(caught)
    require_nothing(tmp_path)
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))


def test_target_on_a_full_disk(hub, published, tmp_path, monkeypatch):
    def half(source, target):
        Path(target).write_bytes(b"half")
        no_room()

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", half)
        with pytest.raises(BundleError, match=r"cannot write .*pulled: No space left on device"):
            pull(REPO, tmp_path / "new" / "pulled")
    require_nothing(tmp_path)
    require_pulled(hub, pull(REPO, tmp_path / "pulled"))


def test_too_little_room_is_seen_before_the_weights_are_fetched(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(VitregError, match=r"lab/model takes 3\.\d MB, but at .*only 0\.1 MB are free: make") as caught:
        pull(REPO, tmp_path / "pulled")
    sentence(caught)
    assert not [path for _, path, _ in hub.requests if path.endswith("/model.safetensors")]
    require_nothing(tmp_path)


def test_broken_config_on_the_hub(hub, published, tmp_path):
    files = hub.repos[REPO].resolve("main").files
    for content in (b"{", json.dumps([1]).encode()):
        hub.repos[REPO].commit("main", "broken", {**files, "config.json": Blob(content)})
        with pytest.raises(
            BundleError, match="hf-hub:lab/model is not a bundle but a repository with the checkp"
        ) as caught:
            pull(REPO, tmp_path / "pulled")
        sentence(caught)
