"""An in-process stand-in for the Hugging Face Hub, which the real clients publish models to and load them from."""

import base64
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_state import Blob, HubError, Repository, Response, User, front_matter

LFS_PATTERNS = ("*.bin", "*.onnx", "*.pt", "*.safetensors")
LFS_THRESHOLD = 10 * 2**20
COMMITS_A_PAGE = 50


class Drop(Exception):
    """Raised by a fault hook to close the connection without an answer."""


class Request(BaseHTTPRequestHandler):
    """One HTTP request, with its `query` and `body`; being HTTP/1.0, no connection outlives its request."""

    def _serve(self) -> None:
        url, length = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        self.path, self.query, self.body = url.path, parse_qs(url.query), self.rfile.read(length)
        try:
            status, headers, body = self.server.fault(self) or self.server.respond(self)
        except HubError as error:
            status, headers, body = error.response
        except Drop:
            status = 0
        self.server.requests.append((self.command, self.path, status))
        if status:
            self.send_response_only(status)
            size = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
            for name, value in (size | dict(headers)).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.writelines([body] if isinstance(body, bytes) else body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve


class HubServer(ThreadingHTTPServer):
    """The server, which serves until its context is left and keeps everything in memory, for tests to look at.

    Args:
        tokens: The valid access tokens, each with its `User` or just the user's name.
        fault: Sees every request first; a `Response` from it is sent instead of the Hub's. It may raise `Drop`.
    """

    def __init__(self, tokens: Mapping[str, User | str], fault: Callable[[Request], Response | None] | None = None):
        super().__init__(("127.0.0.1", 0), Request)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {token: User(user) if isinstance(user, str) else user for token, user in tokens.items()}
        self.fault = fault or (lambda request: None)
        self.repos: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, int]] = []  # Method, path and status, which is 0 where it was dropped.
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        super().__exit__(*exc_info)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def env(self, token: str = "") -> dict[str, str]:
        """The environment variables with which a fresh process talks to this server, as the owner of `token`."""
        disabled = {f"HF_HUB_DISABLE_{part}": "1" for part in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", **disabled}

    def respond(self, request: Request) -> Response:
        """Answers one request as the Hub does."""
        for method, pattern, handler in self._ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method == request.command.replace("HEAD", "GET"):
                with self._lock:  # Each change is atomic, and no reader sees half of it.
                    answer = handler(self, request, *(unquote(part) for part in match.groups() if part))
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise HubError(404, f"No such endpoint: {request.command} {request.path}")

    def _user(self, request: Request, required: bool = True) -> User | None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.tokens and (token or required):
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens.get(token)

    def _repository(self, request: Request, repo: str, write: bool = False, propose: bool = False) -> Repository:
        """The repository, if the request may read it, or `write` to it, or `propose` changes, which any user may."""
        user, repository = self._user(request, required=False), self.repos.get(repo)
        member = user is not None and repo.split("/")[0] in (user.name, *user.orgs)
        if repository is None or (repository.private and not member) or ((write or propose) and user is None):
            # The Hub sends no code for a refused write, as the client infers it from the URL, but only for https.
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if (write and not member) or ((write or propose) and user.read_only):
            raise HubError(403, f"You don't have the rights to write to {repo}")
        return repository

    def _whoami(self, request: Request) -> dict:
        user = self._user(request)
        auth = {"type": "access_token", "accessToken": {"role": "read" if user.read_only else "write"}}
        return {"type": "user", "name": user.name, "orgs": [{"name": org} for org in user.orgs], "auth": auth}

    def _create_repo(self, request: Request) -> dict:
        user, payload = self._user(request), json.loads(request.body)
        namespace = payload.get("organization") or user.name
        repo = f"{namespace}/{payload['name']}"
        created = {"name": repo, "url": f"{self.endpoint}/{repo}"}
        if user.read_only or namespace not in (user.name, *user.orgs) or payload.get("type", "model") != "model":
            raise HubError(403, f"You don't have the rights to create such a repository under {namespace}")
        if repo in self.repos:
            # With `exist_ok` the client takes the URL from this refusal.
            raise HubError(409, "You already created this model repo", **created)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.repos[repo] = Repository(private=payload.get("visibility") == "private")
        self.repos[repo].commit("main", "initial commit", {".gitattributes": Blob(attributes.encode())})
        return created

    def _model_info(self, request: Request, repo: str, rev: str = "main") -> dict:
        commit, blobs = self._repository(request, repo).resolve(rev), "blobs" in request.query
        siblings = [{"rfilename": path, **(blob.metadata if blobs else {})} for path, blob in commit.files.items()]
        return {**self._listed(repo), "sha": commit.oid, "siblings": siblings}

    def _listed(self, repo: str) -> dict:
        repository = self.repos[repo]
        told = {"id": repo, "private": repository.private, "tags": repository.tags_of_card}
        popularity = {"downloads": repository.downloads, "likes": repository.likes}
        return {**told, **popularity, "lastModified": repository.resolve("main").date}

    def _list_models(self, request: Request) -> list[dict]:
        user, query = self._user(request, required=False), request.query
        homes = (user.name, *user.orgs) if user else ()
        listed = [self._listed(repo) for repo in self.repos]
        found = [
            model
            for model in listed
            if set(query.get("filter", ())) <= set(model["tags"])
            and query.get("author", [model["id"].split("/")[0]]) == [model["id"].split("/")[0]]
            and query.get("search", [""])[0].lower() in model["id"].lower()
            and (not model["private"] or model["id"].split("/")[0] in homes)  # Others' are not listed.
        ]
        if "sort" in query:
            found.sort(key=lambda model: model[query["sort"][0]], reverse=True)
        if "expand" in query:  # Then nothing else is told.
            found = [{name: model[name] for name in ("id", *query["expand"])} for model in found]
        return found[: int(query.get("limit", [1000])[0])]

    def _validate_yaml(self, request: Request) -> Response:
        try:
            front_matter(json.loads(request.body)["content"])
        except yaml.YAMLError as error:
            return 400, {}, json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode()
        return 200, {}, b'{"errors": [], "warnings": []}'

    def _refs(self, request: Request, repo: str) -> dict:
        def listed(refs: Mapping[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]

        repository = self._repository(request, repo)
        found = {"branches": listed(repository.branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/")}
        proposed = {"pullRequests": listed(repository.pull_requests, "")} if "include_prs" in request.query else {}
        return {**found, "converts": [], **proposed}

    def _commits(self, request: Request, repo: str, rev: str) -> Response:
        history, page = self._repository(request, repo).history(rev), int(request.query.get("p", ["0"])[0])
        start, stop = page * COMMITS_A_PAGE, (page + 1) * COMMITS_A_PAGE
        told = [
            {"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": []} for c in history[start:stop]
        ]
        more = {"Link": f'<{self.endpoint}{request.path}?p={page + 1}>; rel="next"'} if history[stop:] else {}
        return 200, more, json.dumps(told).encode()

    def _create_branch(self, request: Request, repo: str, branch: str) -> dict:
        repository = self._repository(request, repo, write=True)
        start = json.loads(request.body).get("startingPoint", "main")
        if branch in repository.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        if branch.startswith("refs/") or re.search(r"\.\.|[\s~^:?*\[]", branch):
            raise HubError(400, f"Invalid reference for a branch: {branch!a}")
        repository.branches[branch] = repository.resolve(start).oid
        return {}

    def _create_tag(self, request: Request, repo: str, rev: str) -> dict:
        repository, tag = self._repository(request, repo, write=True), json.loads(request.body)["tag"]
        if tag in repository.tags:
            raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
        repository.tags[tag] = repository.resolve(rev).oid
        return {}

    def _tree(self, request: Request, repo: str, rev: str, folder: str = "") -> list[dict]:
        files, prefix = self._repository(request, repo).resolve(rev).files, f"{folder}/" if folder else ""
        below = [path for path in files if path.startswith(prefix)]
        if folder and not below:
            raise HubError(404, f"{folder!a} does not exist", "EntryNotFound")
        if request.query.get("recursive") != ["true"]:
            below = [path for path in below if "/" not in path.removeprefix(prefix)]
        return [{"type": "file", "path": path, **files[path].metadata} for path in below]

    def _preupload(self, request: Request, repo: str, rev: str) -> dict:
        proposed = "create_pr" in request.query
        head = self._repository(request, repo, write=not proposed, propose=proposed).resolve(rev)
        payload, files = json.loads(request.body), []
        hosted = head.files[".gitignore"].content.decode() if ".gitignore" in head.files else ""
        patterns = [line for line in (payload.get("gitIgnore") or hosted).splitlines() if not line.startswith("#")]
        for path, size in ((file["path"], file["size"]) for file in payload["files"]):
            mode = "lfs" if size > LFS_THRESHOLD or any(fnmatch(path, name) for name in LFS_PATTERNS) else "regular"
            ignored = any(fnmatch(path, pattern) for pattern in patterns)
            oid = head.files[path].etag if path in head.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
        return {"files": files}

    def _lfs_batch(self, request: Request, repo: str) -> dict:
        repository, objects = self._repository(request, repo, propose=True), []  # It knows of no pull requests.
        for oid, size in ((item["oid"], item["size"]) for item in json.loads(request.body)["objects"]):
            target = {"href": f"{self.endpoint}/lfs/{repo}/{oid}"}
            missing = {} if oid in repository.lfs_objects else {"actions": {"upload": target, "verify": target}}
            objects.append({"oid": oid, "size": size, **missing})
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, request: Request, repo: str, oid: str) -> dict:
        # The client sends no token: on the Hub the URL is signed. Here, too, it admits one particular content only.
        blob = Blob(request.body, lfs=True)
        if repo not in self.repos or blob.etag != oid:
            raise HubError(400, f"The content is not that of LFS object {oid}")
        self.repos[repo].lfs_objects[oid] = blob
        return {}

    def _lfs_verify(self, request: Request, repo: str, oid: str) -> dict:
        return self._repository(request, repo, propose=True).lfs_object(oid, json.loads(request.body)["size"]).metadata

    def _commit(self, request: Request, repo: str, rev: str) -> dict:
        proposed = "create_pr" in request.query
        repository = self._repository(request, repo, write=not proposed, propose=proposed)
        header, *changes = (json.loads(line) for line in request.body.splitlines())
        if rev not in repository.branches:
            raise HubError(404, f"Not a branch that takes commits: {rev!a}", "RevisionNotFound")
        # A pull request starts from the parent that it names, a commit must find it at the head.
        parent = header["value"].get("parentCommit", "")
        head = repository.resolve(parent if proposed and parent else rev)
        if not head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in ((change["key"], change["value"]) for change in changes):
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = repository.lfs_object(value["oid"], value["size"])
            elif key != "deletedFile" or files.pop(value["path"], None) is None:
                raise HubError(404, f"Cannot do {key} for {value['path']!a}", "EntryNotFound")
        commit, request_url = repository.add(head.oid, header["value"]["summary"], files), {}
        if proposed:
            number = len(repository.pull_requests) + 1
            repository.pull_requests[f"refs/pr/{number}"] = commit.oid
            request_url = {"pullRequestUrl": f"{self.endpoint}/{repo}/discussions/{number}"}
        else:
            repository.branches[rev] = commit.oid
        url = f"{self.endpoint}/{repo}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url, **request_url}

    def _resolve(self, request: Request, repo: str, rev: str, path: str) -> Response:
        commit = self._repository(request, repo).resolve(rev)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            # Knowing the commit, the client remembers that it lacks this file.
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        content, etag = commit.files[path].content, f'"{commit.files[path].etag}"'
        size = len(content)
        headers |= {"ETag": etag, "X-Linked-ETag": etag, "X-Linked-Size": str(size)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if not wanted:
            return 200, headers, content
        start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        if start >= stop:
            return 416, {**headers, "Content-Range": f"bytes */{size}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, content[start:stop]

    _REPO = "([^/]+(?:/[^/]+)?)"
    _ROUTES = (
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/validate-yaml", _validate_yaml),
        ("POST", "/api/repos/create", _create_repo),
        ("GET", "/api/models", _list_models),
        ("GET", f"/api/models/{_REPO}(?:/revision/([^/]+))?", _model_info),
        ("GET", f"/api/models/{_REPO}/refs", _refs),
        ("GET", f"/api/models/{_REPO}/commits/([^/]+)", _commits),
        ("POST", f"/api/models/{_REPO}/branch/([^/]+)", _create_branch),
        ("POST", f"/api/models/{_REPO}/tag/([^/]+)", _create_tag),
        ("GET", f"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", _tree),  # Of files only: no client needs the folders.
        ("POST", f"/api/models/{_REPO}/preupload/([^/]+)", _preupload),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", f"/lfs/{_REPO}/([0-9a-f]+)", _lfs_upload),
        ("POST", f"/lfs/{_REPO}/([0-9a-f]+)", _lfs_verify),
        ("POST", f"/api/models/{_REPO}/commit/([^/]+)", _commit),
        ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", _resolve),
    )
