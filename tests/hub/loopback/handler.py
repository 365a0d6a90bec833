"""How the loopback Hub answers: one method for each thing huggingface_hub asks.

Written from what the client sends and expects (its hf_api.py, _commit_api.py, lfs.py and file_download.py) and from
the Hub's documented headers; not meant to be complete.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import yaml

from tests.hub.loopback.repository import BRANCH, REQUEST, TAG, Commit, Repository, StoredFile
from tests.hub.loopback.transport import Answer, Refusal, Transport

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"


class Handler(Transport):
    # Who asks, and for what

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def readable(self, repo: str, *, files: bool = False) -> Repository:
        user, found = self.user, self.hub.repositories.get(repo)
        if found is None or (found.private and user != found.owner):
            raise Refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if files and found.gated and user != found.owner and user not in found.granted:
            message = f"Access to model {repo} is restricted."
            raise Refusal(401 if user is None else 403, "GatedRepo", message)
        return found

    def writable(self, repo: str, *, pull_request: bool = False) -> Repository:
        """Everyone who is logged in may open pull requests; nobody may write by a token that only reads."""
        found = self.readable(repo)
        if self.user is None:
            raise Refusal(401, None, "Invalid username or password.")
        reads = self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.readers
        if reads or (self.user != found.owner and not pull_request):
            raise Refusal(403, None, "you don't have the rights to write to this repository")
        return found

    def at(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Users and repositories

    def whoami(self) -> Answer:
        if self.user is None:
            raise Refusal(401, None, "Invalid username or password.")
        return self.json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> Answer:
        asked = json.loads(self.body)
        user = self.user
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        owner = asked.get("organization") or user
        repo = f"{owner}/{asked['name']}"
        if owner != user or self.headers["Authorization"].removeprefix("Bearer ") in self.hub.readers:
            raise Refusal(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repositories:
            return self.json({**url, "error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[repo] = Repository(repo, private=private)
        return self.json(url)

    def validate_yaml(self) -> Answer:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\s*\n(.*?)\n---\s*\n", content, re.DOTALL)
        try:
            found = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            return self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        warned = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return self.json({"errors": [], "warnings": warned})

    def model_info(self, repo: str, revision: str = "main") -> Answer:
        repository = self.readable(repo)
        commit = self.at(repository, revision)
        blobs = self.query.get("blobs", "").lower() == "true"
        siblings = [
            {"rfilename": path, **({"size": len(file.content), "blobId": file.blob_id} if blobs else {})}
            for path, file in commit.files.items()
        ]
        return self.json(
            {
                "id": repo,
                "modelId": repo,
                "author": repository.owner,
                "sha": commit.sha,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": siblings,
            }
        )

    def refs(self, repo: str) -> Answer:
        repository = self.readable(repo)
        kinds = {"branches": BRANCH, "tags": TAG, "pullRequests": REQUEST}
        listed = {
            kind: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in repository.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        return self.json({**listed, "converts": []})

    def commits(self, repo: str, revision: str) -> Answer:
        repository = self.readable(repo)
        listed = []
        commit: Commit | None = self.at(repository, revision)
        while commit is not None:
            date = "2025-01-01T00:00:00.000Z"
            listed.append({"id": commit.sha, "title": commit.message, "message": "", "date": date, "authors": []})
            commit = repository.commits[commit.parent] if commit.parent else None
        return self.json(listed)

    # Files

    def tree(self, repo: str, revision: str, folder: str = "") -> Answer:
        repository = self.readable(repo)
        commit = self.at(repository, revision)
        start = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in commit.files.items():
            if not path.startswith(start):
                continue
            parts = path.removeprefix(start).split("/")
            for depth in range(1, len(parts)) if deep else range(1, min(2, len(parts))):
                name = start + "/".join(parts[:depth])
                entries.setdefault(name, {"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
            if deep or len(parts) == 1:
                entries[path] = described(path, file)
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        first = int(self.query.get("cursor", 0))
        last = first + self.hub.page_size
        more = {}
        if last < len(entries):
            following = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={deep}&cursor={last}"
            more = {"Link": f'<{following}>; rel="next"'}
        return self.json(list(entries.values())[first:last], headers=more)

    def paths_info(self, repo: str, revision: str) -> Answer:
        commit = self.at(self.readable(repo), revision)
        asked = parse_qs(self.body.decode())["paths"]
        return self.json([described(path, commit.files[path]) for path in asked if path in commit.files])

    def resolve(self, repo: str, revision: str, path: str) -> Answer:
        repository = self.readable(repo, files=True)
        commit = self.at(repository, revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.headers.update(headers)
            raise refusal
        headers.update({"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"})
        if file.lfs:
            headers.update({"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))})
        size = len(file.content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.data(file.content, headers=headers)
        first, last = int(span[1]), min(int(span[2] or size - 1), size - 1)
        if first > last:
            raise Refusal(416, None, f"there are {size} bytes")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.data(file.content[first : last + 1], 206, headers)

    # Writing

    def preupload(self, repo: str, revision: str) -> Answer:
        repository = self.writable(repo, pull_request="create_pr" in self.query)
        present = self.at(repository, revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, there = asked["path"], present.get(asked["path"])
            mode = "lfs" if self.hub.is_large(path, asked["size"]) else "regular"
            answer = {"path": path, "uploadMode": mode, "shouldIgnore": path in self.hub.ignored}
            answers.append(answer if there is None else {**answer, "oid": there.etag})
        return self.json({"files": answers})

    def lfs_batch(self, repo: str) -> Answer:
        repository = self.writable(repo, pull_request="ref" not in json.loads(self.body))
        answers = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if oid in repository.storage:
                answers.append({"oid": oid, "size": size})
                continue
            address = f"{self.hub.endpoint}/lfs/{quote(repo)}/{oid}"
            upload: dict[str, Any] = {"href": address}
            if size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                parts = {f"{number:05}": f"{address}?part={number}" for number in range(1, count + 1)}
                upload = {"href": address, "header": {"chunk_size": str(self.hub.part_size), **parts}}
            actions = {"upload": upload, "verify": {"href": f"{address}/verify"}}
            answers.append({"oid": oid, "size": size, "authenticated": True, "actions": actions})
        return self.json({"transfer": "basic", "objects": answers})

    def lfs_put(self, repo: str, oid: str) -> Answer:
        """One part, or the whole; the address is secret enough, as with the real Hub's storage."""
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"])] = self.body
        else:
            self._store(repo, oid, self.body)
        return self.data(b"", headers={"ETag": f'"{oid[:8]}-{self.query.get("part", 0)}"'})

    def lfs_complete(self, repo: str, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self._store(repo, oid, b"".join(self.hub.parts.pop((oid, number)) for number in numbers))
        return self.json({"success": True})

    def _store(self, repo: str, oid: str, content: bytes) -> None:
        if StoredFile(content, True).sha256 != oid:
            raise Refusal(422, None, "the content is not what its SHA-256 says")
        self.hub.repositories[repo].storage[oid] = content

    def lfs_verify(self, repo: str, oid: str) -> Answer:
        content = self.hub.repositories[repo].storage.get(oid)
        if content is None or len(content) != json.loads(self.body)["size"]:
            raise Refusal(404, None, "no such object")
        return self.json({"success": True})

    def commit(self, repo: str, revision: str) -> Answer:
        pull_request = "create_pr" in self.query
        repository = self.writable(repo, pull_request=pull_request)
        commit, ref = self.at(repository, revision), repository.full_ref(revision)
        if ref is None or ref.startswith(TAG):
            raise Refusal(400, None, f"{revision} is no branch")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", commit.sha) != commit.sha:
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        files, gone = _operations(lines[1:], commit, repository)
        made, target = repository.commit(files, gone, ref=ref, message=header["summary"], pull_request=pull_request)
        number = target.removeprefix(REQUEST) if pull_request else None
        return self.json(
            {
                "success": True,
                "commitOid": made.sha,
                "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.sha}",
                "pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/{number}" if number else None,
                "hookOutput": "",
            }
        )


def described(path: str, file: StoredFile) -> dict[str, Any]:
    size = len(file.content)
    entry = {"type": "file", "path": path, "oid": file.blob_id, "size": size}
    return {**entry, "lfs": {"oid": file.sha256, "size": size, "pointerSize": 134}} if file.lfs else entry


def _operations(
    lines: list[dict[str, Any]], commit: Commit, repository: Repository
) -> tuple[dict[str, StoredFile], list[str]]:
    """The files that a commit brings and the paths that it takes away."""
    files: dict[str, StoredFile] = {}
    gone: list[str] = []
    for line in lines:
        value = line["value"]
        path = value["path"]
        match line["key"]:
            case "file":
                files[path] = StoredFile(base64.b64decode(value["content"]), False)
            case "lfsFile":
                if value["oid"] not in repository.storage:
                    raise Refusal(400, None, f"{path} was not uploaded")
                files[path] = StoredFile(repository.storage[value["oid"]], True)
            case "deletedFile":
                if path not in commit.files:
                    raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                gone.append(path)
            case "deletedFolder":
                gone.extend(name for name in commit.files if name.startswith(path.rstrip("/") + "/"))
            case other:
                raise Refusal(400, None, f"unknown operation {other}")
    return files, gone


Handler.routes = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create_repo),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {_MODEL}(/revision/(?P<revision>[^/]+))?", Handler.model_info),
    (rf"GET {_MODEL}/refs", Handler.refs),
    (rf"GET {_MODEL}/commits/(?P<revision>[^/]+)", Handler.commits),
    (rf"GET {_MODEL}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    (rf"POST {_MODEL}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (rf"POST {_MODEL}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"POST {_MODEL}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (rf"PUT /lfs/{_REPO}/(?P<oid>\w+)", Handler.lfs_put),
    (rf"POST /lfs/{_REPO}/(?P<oid>\w+)", Handler.lfs_complete),
    (rf"POST /lfs/{_REPO}/(?P<oid>\w+)/verify", Handler.lfs_verify),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
