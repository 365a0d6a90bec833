"""A Hub on 127.0.0.1, in this process: as much of the real one's interface as pushing and loading ask of it.

    with LoopbackHub() as hub:
        sha = hub.create("someone/model", {"config.json": b"{}"})
        snapshot_download("someone/model", endpoint=hub.endpoint, token=hub.token)

Other processes get there by `environment()`, which like the fixture makes huggingface_hub use plain Git LFS. Written
from what huggingface_hub sends and expects.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub.utils.sha import git_hash

_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}

Files = dict[str, bytes]
Answer = tuple[int, Any, dict[str, str]]
"""Status, content (bytes, or what is sent as JSON), headers."""


@dataclass
class Repository:
    """Its commits, each with all files, and the commits that branches, tags ("v1") and pull requests are at."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: Files = field(default_factory=dict)

    def commit(self, ref: str, files: Files) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


class Refusal(Exception):
    """An answer other than success: its status, the Hub's error code, and what the Hub says."""

    def __init__(self, status: int, code: str = "", message: str = "refused") -> None:
        self.answer: Answer = (status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class LoopbackHub:
    """Serves until the `with` block ends.

    Attributes:
        users: user names by token; a namespace's owner alone may write to it, and everyone may open pull requests.
        reader: a token of the owner's that may not write.
        repositories: by id.
        requests: "METHOD /path" of all that was asked.
    """

    def __init__(self) -> None:
        self.token, self.other_token, self.reader = "loopback-owner", "loopback-other", "loopback-reader"
        self.users = {self.token: "someone", self.other_token: "other", self.reader: "someone"}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with its cache in `home`; by default the owner's token."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        disabled = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token or self.token}
        return {**kept, **disabled, **own, "NO_PROXY": "127.0.0.1"}

    def create(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private: bool = False) -> str:
        """Makes a repository with these files; the id of its commit."""
        repository = self.repositories[repo_id] = Repository(private=private)
        return repository.commit("main", {**_ATTRIBUTES, **(files or {})})

    def head(self, repo_id: str, revision: str = "main") -> str:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, revision
        return commit

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """All files at a revision, but for the .gitattributes that every repository has."""
        files = self.repositories[repo_id].commits[self.head(repo_id, revision)]
        return {path: content for path, content in files.items() if path != ".gitattributes"}


class _Handler(BaseHTTPRequestHandler):
    """One method for each thing that huggingface_hub asks; `_ROUTES` lists them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes: each would wait for an acknowledgement

    def log_message(self, *_: Any) -> None:
        """Nothing goes to stderr; `LoopbackHub.requests` is the log."""

    def do_HEAD(self) -> None:
        self.hub: LoopbackHub = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        target = f"{self.command} {url.path}"
        try:
            with self.hub.lock:
                self.hub.requests.append(unquote(target))
                status, content, headers = self._answer(target)
        except Refusal as refusal:
            status, content, headers = refusal.answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self, target: str) -> Answer:
        for pattern, method in _ROUTES.items():
            if match := re.fullmatch(pattern, target):
                return method(self, **{name: unquote(text) for name, text in match.groupdict("main").items()})
        raise Refusal(404, message=f"the loopback Hub does not know {target}")

    # Who asks, and for what

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def user(self) -> str | None:
        if self.token and self.token not in self.hub.users:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.users.get(self.token)

    def require_writer(self, owner: str | None, *, pull_request: bool = False) -> None:
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        if self.token == self.hub.reader or (self.user != owner and not pull_request):
            raise Refusal(403, message="you don't have the rights to write there")

    def readable(self, repo: str) -> Repository:
        found, user = self.hub.repositories.get(repo), self.user
        if found is None or (found.private and user != repo.split("/")[0]):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def writable(self, repo: str) -> Repository:
        found = self.readable(repo)
        self.require_writer(repo.split("/")[0], pull_request="create_pr" in self.query or "/lfs/" in self.path)
        return found

    def at(self, repo: str, revision: str) -> tuple[str, Files]:
        repository = self.readable(repo)
        sha = repository.find(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # Reading

    def info(self, repo: str, revision: str) -> Answer:
        sha, files = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": repo, "sha": sha, "private": self.readable(repo).private, "siblings": siblings}, {}

    def tree(self, repo: str, revision: str) -> Answer:
        return 200, [_described(path, content) for path, content in self.at(repo, revision)[1].items()], {}

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        sha, files = self.at(repo, revision)
        if path not in files:
            status, content, headers = Refusal(404, "EntryNotFound", "Entry not found").answer
            return status, content, {**headers, "X-Repo-Commit": sha}
        etag = hashlib.sha256(files[path]).hexdigest()
        return 200, files[path], {"X-Repo-Commit": sha, "ETag": f'"{etag}"'}

    # Writing

    def create(self) -> Answer:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        self.require_writer(owner)
        repo = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            return 409, {**url, "error": "You already created this model repo"}, {}
        self.hub.create(repo, private=asked.get("visibility") == "private")
        return 200, url, {}

    def validate_yaml(self) -> Answer:
        return 200, {"errors": [], "warnings": []}, {}

    def preupload(self, repo: str, revision: str) -> Answer:
        self.writable(repo)
        present = self.at(repo, revision)[1]
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            answers.append(
                {"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": False}
            )
            if path in present:
                entry = _described(path, present[path])
                answers[-1]["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        return 200, {"files": answers}, {}

    def lfs_batch(self, repo: str) -> Answer:
        self.writable(repo)
        objects = json.loads(self.body)["objects"]
        for one in objects:
            one["actions"] = {"upload": {"href": f"{self.hub.endpoint}/store/{repo}/{one['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def store(self, repo: str, oid: str) -> Answer:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.repositories[repo].lfs[oid] = self.body
        return 200, b"", {}

    def commit(self, repo: str, revision: str) -> Answer:
        repository, files = self.writable(repo), dict(self.at(repo, revision)[1])
        for line in map(json.loads, self.body.splitlines()[1:]):
            path = line["value"]["path"]
            match line["key"]:
                case "file":
                    files[path] = base64.b64decode(line["value"]["content"])
                case "lfsFile":
                    files[path] = repository.lfs[line["value"]["oid"]]
                case "deletedFile":
                    del files[path]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        is_request = "create_pr" in self.query
        sha = repository.commit(f"refs/pr/{number}" if is_request else revision, files)
        made = {"commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"}
        return 200, {**made, "pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/{number}" * is_request}, {}


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _described(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": git_hash(content), "size": len(content)}
    if _is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


_ROUTES: dict[str, Callable[..., Answer]] = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate_yaml,
    rf"GET {_MODEL}(/revision/(?P<revision>[^/]+))?": _Handler.info,
    rf"GET {_MODEL}/tree/(?P<revision>[^/]+)": _Handler.tree,
    rf"POST {_MODEL}/preupload/(?P<revision>[^/]+)": _Handler.preupload,
    rf"POST {_MODEL}/commit/(?P<revision>[^/]+)": _Handler.commit,
    r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": _Handler.lfs_batch,
    r"PUT /store/(?P<repo>[^/]+/[^/]+)/(?P<oid>\w+)": _Handler.store,
    r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Handler.resolve,
}
