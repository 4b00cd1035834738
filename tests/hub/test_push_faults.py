"""Pushes that go wrong: each fault ends with the old state or the new one on the Hub, or in one sentence."""

import json
import time

import httpx2 as httpx
import pytest
from hub_faults import DROP, HTML, LOSE, LOSE_IN_GATEWAY, LOSE_IN_PORTAL, Fault, sentence
from hub_server import Drop
from hub_state import Blob, User
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from pushers import push

from vitreg_hub.errors import HubError
from vitreg_hub.remote.client import is_transient, pause
from vitreg_hub.remote.commit import Tree

REPO = "lab/model"

pytestmark = pytest.mark.usefixtures("waited")


def require_new(repo, folder, branch="main"):
    """The branch holds the folder's bundle, and what was measured at the doors."""
    files = repo.files(branch)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    told = json.loads(files["config.json"])
    told["vitreg"]["provenance"].pop("doors")
    assert told == json.loads((folder / "config.json").read_bytes())


# Pushes to a repository that holds an older bundle

RECOVERED = {
    "an upload is dropped": Fault(method="PUT", path="/lfs/", act=DROP, times=2),
    "the storage fails for a moment": Fault(method="PUT", path="/lfs/", act=500, times=2),
    "the storage's reply is lost": Fault(method="PUT", path="/lfs/", act=LOSE, times=1),
    "the verification fails for a moment": Fault(method="POST", path=f"/lfs/{REPO}/", act=503, times=1),
    "asking how to upload fails for a moment": Fault(method="POST", path="/preupload/", act=500, times=1),
    "asking where to upload fails for a moment": Fault(method="POST", path="/objects/batch", act=502, times=1),
    "checking the card fails for a moment": Fault(method="POST", path="/validate-yaml", act=503, times=2),
    "the commit fails for a moment": Fault(method="POST", path="/commit/", act=503, times=2),
    "the commit is dropped": Fault(method="POST", path="/commit/", act=DROP, times=2),
    "the Hub waited too long for the commit": Fault(method="POST", path="/commit/", act=408, times=1),
    "the commit's reply is lost": Fault(method="POST", path="/commit/", act=LOSE, times=1),
    "the commit's reply comes too late": Fault(method="POST", path="/commit/", act=LOSE_IN_GATEWAY, times=1),
    "the commit's reply is another's": Fault(method="POST", path="/commit/", act=LOSE_IN_PORTAL, times=1),
    "too many commits for a moment": Fault(method="POST", path="/commit/", act=429, times=1),
    "the refs are dropped": Fault(method="GET", path="/refs", act=DROP, times=3),
    "the refs fail for a moment": Fault(method="GET", path="/refs", act=500, times=3),
    "the refs are another's for a moment": Fault(method="GET", path="/refs", act=200, body=HTML, times=1),
    "the tree fails for a moment": Fault(method="GET", path="/revision/", act=503, times=3),
    "the old card fails for a moment": Fault(method="GET", path="/resolve/", act=503, times=2),
}


@pytest.mark.parametrize("what", RECOVERED)
def test_push_gets_over(hub, published, old, new, what):
    hub.fault = RECOVERED[what].on(hub)
    pushed = push(new, REPO)
    repo = hub.repos[REPO]
    assert [commit.parent for commit in repo.commits[1:]] == [repo.commits[0].oid, published]  # and no second one
    assert pushed.commit == repo.branches["main"] == repo.commits[-1].oid
    assert pushed.url == f"{hub.endpoint}/{REPO}/commit/{pushed.commit}"
    require_new(repo, new)


GIVEN_UP = {
    "an upload is always dropped": (Fault(method="PUT", path="/lfs/", act=DROP), "sending to lab/model failed .*again"),
    "the storage refuses": (Fault(method="PUT", path="/lfs/", act=403), "sending to lab/model failed .*try again"),
    "the storage always fails": (Fault(method="PUT", path="/lfs/", act=503), "sending to lab/model failed .*try again"),
    "the storage forgets": (Fault(method="PUT", path="/lfs/", act=200), "sending to lab/model failed .*try again"),
    "the verification fails": (Fault(method="POST", path=f"/lfs/{REPO}/", act=400), "sending to lab/model failed"),
    "asking how to upload fails": (Fault(method="POST", path="/preupload/", act=500), "status 500 .*try again later"),
    "asking where to upload fails": (Fault(method="POST", path="/objects/batch", act=503), "status 503 .*again later"),
    "the card is refused": (
        Fault(method="POST", path="/validate-yaml", act=400, body=b'{"errors": [{"message": "no such license"}]}'),
        "the Hub does not accept a file for lab/model: Invalid metadata in README.md. - no such license",
    ),
    "the card is never checked": (
        Fault(method="POST", path="/validate-yaml", act=503),
        "does not answer like a Hub: check",
    ),
    "the commit always fails": (Fault(method="POST", path="/commit/", act=500), "status 500 .*try again later"),
    "the commit is always dropped": (
        Fault(method="POST", path="/commit/", act=DROP),
        "cannot be reached .*check the n",
    ),
    "the commit is refused": (Fault(method="POST", path="/commit/", act=400, body=b"no\nsuch\nluck"), "no such luck"),
    "too many commits": (Fault(method="POST", path="/commit/", act=429), "wait some minutes and try again"),
    "the refs always fail": (Fault(method="GET", path="/refs", act=500), "status 500 .*try again later"),
    "the refs are another's": (
        Fault(method="GET", path="/refs", act=200, body=HTML),
        "does not answer like a Hub: check",
    ),
    "the old card always fails": (Fault(method="HEAD", path="/resolve/", act=503), "status 503 .*try again later"),
}


@pytest.mark.parametrize("what", GIVEN_UP)
def test_push_gives_up_and_leaves_the_repository_as_it_was(hub, published, new, what):
    fault, says = GIVEN_UP[what]
    hub.fault = fault.on(hub)
    with pytest.raises(HubError, match=says) as caught:
        push(new, REPO)
    sentence(caught)
    repo = hub.repos[REPO]
    assert (repo.branches, len(repo.commits)) == ({"main": published}, 2)
    hub.fault = lambda request: None
    push(new, REPO)  # and what the sentence says helps
    require_new(repo, new)


def test_rate_limit_is_waited_for(hub, published, new, waited):
    replies = [(429, {"ratelimit": '"api";r=0;t=41'}, b"")]
    hub.fault = lambda request: replies.pop() if replies and "/commit/" in request.path else None
    push(new, REPO)
    assert 42 in waited


def test_commit_waits_as_long_as_the_hub_says(hub, published, new, waited):
    replies = [(429, {"Retry-After": "30"}, b"")]
    hub.fault = lambda request: replies.pop() if replies and "/commit/" in request.path else None
    push(new, REPO)
    assert 31 in waited


PAUSES = [
    ({}, 4),
    ({"ratelimit": '"api";r=0;t=41'}, 42),
    ({"ratelimit": '"api";r=0;t=1'}, 4),
    ({"ratelimit": '"api";r=3;t=41'}, 4),
    ({"ratelimit": '"api";r=0;t=99999999'}, 300),
    ({"Retry-After": "30"}, 31),
    ({"Retry-After": "1"}, 4),
    ({"Retry-After": "99999999"}, 300),
    ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 4),
]


@pytest.mark.parametrize(("headers", "seconds"), PAUSES)
def test_pause(headers, seconds, waited):
    response = httpx.Response(429, headers=headers, request=httpx.Request("POST", "http://hub"))
    pause(HfHubHTTPError("too many", response=response), 4)
    assert waited == [seconds]


def test_what_is_tried_again():
    for error in (httpx.ConnectError("down"), httpx.ReadTimeout("slow"), json.JSONDecodeError("no", "", 0)):
        assert is_transient(error)
    for error in (httpx.ProxyError("no such proxy"), httpx.UnsupportedProtocol("hub:"), FileNotFoundError(2, "none")):
        assert not is_transient(error)


def test_failing_commits_hash_and_send_the_weights_once(hub, published, new):
    hub.fault = Fault(method="POST", path="/commit/", act=503, times=3).on(hub)
    before = len(hub.requests)
    push(new, REPO)
    asked = [path for method, path, _ in hub.requests[before:] if method != "GET"]
    for part, times in {"/preupload/": 1, "/objects/batch": 1, "/commit/": 4}.items():
        assert sum(part in path for path in asked) == times


@pytest.mark.parametrize("create_pr", [False, True])
def test_gitignore_of_the_repository_leaves_nothing_out(hub, published, new, create_pr):
    repo = hub.repos[REPO]
    ignoring = {".gitignore": Blob(b"*.safetensors\nconfig.json\n")}
    repo.commit("main", "by hand", {**repo.resolve("main").files, **ignoring})
    push(new, REPO, create_pr=create_pr)
    require_new(repo, new, branch="refs/pr/1" if create_pr else "main")


def test_refusal_tells_the_hubs_reason(hub, published, new):
    full = {"X-Error-Message": "Private repository storage limit reached, please upgrade your plan."}
    hub.fault = lambda request: (403, full, b"") if "/preupload/" in request.path else None
    with pytest.raises(HubError, match=r"lab/model \(Private repository storage limit .* your plan\): use a") as caught:
        push(new, REPO)
    sentence(caught)


def test_gated_repository(hub, published, new):
    gated = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b""
    hub.fault = lambda request: gated if request.path.endswith("/refs") else None
    with pytest.raises(HubError, match="lab/model is gated: ask for access") as caught:
        push(new, REPO)
    sentence(caught)


# Xet, which is how the Hub takes and gives large files


def xet_token(storage: str) -> bytes:
    return json.dumps({"casUrl": storage, "accessToken": "x", "exp": int(time.time()) + 3600}).encode()


XET = {
    "no token": {"act": 404},
    "the token fails": {"act": 500},
    "the token is another's": {"act": 200, "body": HTML},
    "the storage is not there": {"act": 200, "body": xet_token("http://127.0.0.1:9")},
}


@pytest.mark.parametrize("what", XET)
def test_upload_by_xet_that_breaks_off(hub, published, new, monkeypatch, what):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    hub.fault = Fault(method="GET", path="/xet-write-token", **XET[what]).on(hub)
    with pytest.raises(HubError, match=r"sending to lab/model failed .*try again, or set HF_HUB_DISABLE_XET") as caught:
        push(new, REPO)
    sentence(caught)
    repo = hub.repos[REPO]
    assert (repo.branches, len(repo.commits)) == ({"main": published}, 2)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    push(new, REPO)
    require_new(repo, new)


# Pushes that meet another


def tree(**files):
    checksums = {name.replace("_", "."): Blob(content.encode()).etag for name, content in files.items()}
    return Tree(commit="0" * 40, private=False, checksums=checksums)


FOLLOWERS = [
    ({"a": "new", "kept": "1"}, True),
    ({"a": "new", "kept": "1", "_gitattributes": "the Hub's"}, True),
    ({"a": "new", "kept": "2"}, False),
    ({"a": "new"}, False),
    ({"a": "old", "kept": "1"}, False),
    ({"a": "new", "kept": "1", "gone": "1"}, False),
    ({"a": "new", "kept": "1", "more": "1"}, False),
]


@pytest.mark.parametrize(("files", "follows"), FOLLOWERS)
def test_commit_that_is_ours(files, follows):
    before = tree(a="old", kept="1", gone="1", _gitattributes="")
    after = tree(**{"_gitattributes": "", **files})
    assert after.follows(before, {"a": b"new", "gone": None}) is follows


def test_push_of_another_between_reading_and_committing(hub, published, new):
    repo = hub.repos[REPO]

    def interfere(request):
        if "/commit/" in request.path and len(repo.commits) == 2:
            repo.commit("main", "another's", {**repo.resolve("main").files, "theirs.txt": Blob(b"x")})

    hub.fault = interfere
    with pytest.raises(HubError, match=r"someone else pushed to lab/model \(main\) meanwhile.*run it again") as caught:
        push(new, REPO)
    sentence(caught)
    assert [commit.title for commit in repo.history("main")][:1] == ["another's"]
    assert len(repo.commits) == 3
    push(new, REPO)
    require_new(repo, new)
    assert repo.files()["theirs.txt"] == b"x"


@pytest.mark.parametrize("act", [LOSE, LOSE_IN_GATEWAY])
def test_lost_reply_and_a_push_of_another_on_top(hub, published, new, act):
    repo, lose = hub.repos[REPO], Fault(method="POST", path="/commit/", act=act, times=1).on(hub)

    def hook(request):
        if "/commits/" in request.path and len(repo.commits) == 3:
            repo.commit("main", "another's", {**repo.resolve("main").files, "theirs.txt": Blob(b"x")})
        return lose(request)

    hub.fault = hook
    pushed = push(new, REPO)
    theirs, ours, before, _ = repo.history("main")
    assert (theirs.title, ours.oid, before.oid) == ("another's", pushed.commit, published)
    require_new(repo, new, branch=pushed.commit)


def test_commit_that_was_dropped_while_another_pushed(hub, published, new):
    repo = hub.repos[REPO]

    def hook(request):
        if "/commit/" in request.path and len(repo.commits) == 2:
            repo.commit("main", "another's", {**repo.resolve("main").files, "theirs.txt": Blob(b"x")})
            raise Drop

    hub.fault = hook
    with pytest.raises(HubError, match="someone else pushed"):
        push(new, REPO)
    assert len(repo.commits) == 3


def test_lost_reply_of_a_hub_that_then_says_nothing(hub, published, new):
    lose = Fault(method="POST", path="/commit/", act=LOSE, times=1).on(hub)
    silent = Fault(method="GET", path="/commits/", act=500).on(hub)
    hub.fault = lambda request: lose(request) or silent(request)
    with pytest.raises(HubError, match=r"does not say whether the commit is there: push again later") as caught:
        push(new, REPO)
    sentence(caught)
    hub.fault = lambda request: None
    assert push(new, REPO).sent == ()
    assert len(hub.repos[REPO].commits) == 3


def test_pull_request_whose_reply_is_lost_is_not_opened_twice(hub, published, new):
    hub.fault = Fault(method="POST", path="/commit/", act=LOSE, times=1).on(hub)
    with pytest.raises(HubError, match=rf"look for it at {hub.endpoint}/{REPO}/discussions") as caught:
        push(new, REPO, create_pr=True)
    sentence(caught)
    assert len(hub.repos[REPO].pull_requests) == 1
    assert hub.repos[REPO].branches == {"main": published}


# Repositories, branches and tags that are made

MADE = {
    "making the repository fails for a moment": Fault(method="POST", path="/repos/create", act=503, times=1),
    "the reply to making the repository is lost": Fault(method="POST", path="/repos/create", act=LOSE, times=1),
    "making the branch fails for a moment": Fault(method="POST", path="/branch/", act=500, times=1),
    "the reply to making the branch is lost": Fault(method="POST", path="/branch/", act=LOSE, times=1),
    "setting the tag fails for a moment": Fault(method="POST", path="/tag/", act=502, times=1),
    "the reply to setting the tag is lost": Fault(method="POST", path="/tag/", act=LOSE, times=1),
    "the reply to setting the tag comes too late": Fault(method="POST", path="/tag/", act=LOSE_IN_GATEWAY, times=1),
}


@pytest.mark.parametrize("what", MADE)
def test_what_is_made_once_is_made_once(hub, new, what):
    hub.fault = MADE[what].on(hub)
    pushed = push(new, REPO, branch="best", tag="v1")
    repo = hub.repos[REPO]
    assert repo.branches == {"main": repo.commits[0].oid, "best": pushed.commit}
    assert repo.tags == {"v1": pushed.commit}
    assert len(repo.commits) == 2
    require_new(repo, new, branch="best")


def test_repository_that_cannot_be_made(hub, new):
    hub.fault = Fault(method="POST", path="/repos/create", act=503).on(hub)
    with pytest.raises(HubError, match=r"status 503 .*try again later") as caught:
        push(new, REPO)
    sentence(caught)
    assert not hub.repos


def test_branch_that_cannot_be_made(hub, published, new):
    hub.fault = Fault(method="POST", path="/branch/", act=500).on(hub)
    with pytest.raises(HubError, match="status 500"):
        push(new, REPO, branch="best")
    assert hub.repos[REPO].branches == {"main": published}


def test_tag_that_cannot_be_set_is_set_by_the_next_push(hub, published, new):
    hub.fault = Fault(method="POST", path="/tag/", act=500).on(hub)
    with pytest.raises(
        HubError, match=r"the commit is there .*but not the tag v1; run the same push again to set it"
    ) as caught:
        push(new, REPO, tag="v1")
    repo = hub.repos[REPO]
    assert f"({hub.endpoint}/{REPO}/commit/{repo.branches['main']})" in sentence(caught)
    require_new(repo, new)
    hub.fault = lambda request: None
    again = push(new, REPO, tag="v1")
    assert (repo.tags, len(repo.commits), again.sent) == ({"v1": again.commit}, 3, ())


def test_tag_that_another_sets_at_the_same_time(hub, published, new):
    def hook(request):
        if "/tag/" in request.path:
            hub.repos[REPO].tags["v1"] = published

    hub.fault = hook
    with pytest.raises(HubError, match="has a tag v1 at another commit") as caught:
        push(new, REPO, tag="v1")
    sentence(caught)
    assert hub.repos[REPO].tags == {"v1": published}


# Who may do what

PUSHERS = {
    "no token": (None, REPO, "no access token: run `hf auth login` or set HF_TOKEN"),
    "a wrong token": ("hf_wrong", REPO, "the access token for lab/model is missing or invalid"),
    "a token that may only read": ("hf_reader", REPO, "may not do this with lab/model .*: use a token with write"),
    "someone else's organisation": ("hf_bob", REPO, "may not do this with lab/model .*: use a token with write"),
    "an organisation where nothing may be made": ("hf_bob", "lab/more", "may not do this with lab/more .*: use a"),
}


@pytest.mark.parametrize("who", PUSHERS)
def test_push_without_permission(hub, published, new, monkeypatch, who):
    token, repo_id, says = PUSHERS[who]
    hub.tokens["hf_bob"] = User("bob")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=says) as caught:
        push(new, repo_id)
    sentence(caught)
    assert hub.repos.keys() == {REPO}
    assert hub.repos[REPO].branches == {"main": published}
