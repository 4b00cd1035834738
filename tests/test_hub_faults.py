"""Pushes that go wrong: each fault ends with the old state or the new one on the Hub, or in one sentence."""

import pytest
from hub_faults import DROP, HTML, LOSE, LOSE_IN_GATEWAY, LOSE_IN_PORTAL, Fault, sentence
from hub_server import Drop
from hub_state import Blob, User

from vitreg_hub.errors import HubError
from vitreg_hub.hub import push

REPO = "lab/model"

pytestmark = pytest.mark.usefixtures("waited", "verified")


def require_new(repo, folder, branch="main"):
    """The branch holds the folder's bundle."""
    files = repo.files(branch)
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (folder / name).read_bytes()


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
        "the Hub does not take a file for lab/model: Invalid metadata in README.md. - no such license",
    ),
    "the card is never checked": (Fault(method="POST", path="/validate-yaml", act=503), "not what a Hub does: check"),
    "the commit always fails": (Fault(method="POST", path="/commit/", act=500), "status 500 .*try again later"),
    "the commit is always dropped": (
        Fault(method="POST", path="/commit/", act=DROP),
        "cannot be reached .*check the n",
    ),
    "the commit is refused": (Fault(method="POST", path="/commit/", act=400, body=b"no\nsuch\nluck"), "no such luck"),
    "too many commits": (Fault(method="POST", path="/commit/", act=429), "wait some minutes and try again"),
    "the refs always fail": (Fault(method="GET", path="/refs", act=500), "status 500 .*try again later"),
    "the refs are another's": (Fault(method="GET", path="/refs", act=200, body=HTML), "not what a Hub does: check"),
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


# Pushes that meet another


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
    with pytest.raises(HubError, match=r"does not tell whether the commit is there: push again later") as caught:
        push(new, REPO)
    sentence(caught)
    hub.fault = lambda request: None
    assert push(new, REPO).sent == ()
    assert len(hub.repos[REPO].commits) == 3


def test_pull_request_whose_reply_is_lost_is_not_opened_twice(hub, published, new):
    hub.fault = Fault(method="POST", path="/commit/", act=LOSE, times=1).on(hub)
    with pytest.raises(HubError, match=rf"look at {hub.endpoint}/{REPO}/discussions") as caught:
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
        HubError, match=r"the commit is there .*but not the tag v1, which the same push again sets"
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
    "a token that may only read": ("hf_reader", REPO, "may not do this with lab/model: use a token with write"),
    "someone else's organisation": ("hf_bob", REPO, "may not do this with lab/model: use a token with write"),
    "an organisation where nothing may be made": ("hf_bob", "lab/more", "may not do this with lab/more: use a token"),
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
