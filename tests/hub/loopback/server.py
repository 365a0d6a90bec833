"""A Hub on 127.0.0.1, in this process: what huggingface_hub asks of the real one, with faults on demand.

    with LoopbackHub() as hub:
        sha = hub.create("someone/model", {"config.json": b"{}"})
        snapshot_download("someone/model", endpoint=hub.endpoint, token=hub.token)
        hub.fault(r"PUT /lfs/", cut_upload=1000, times=None)  # every upload now breaks off after 1000 bytes
        assert hub.asked(r"POST .*/commit/") == []

Processes of their own get there by `environment()`. Large files go over plain Git LFS: with hf-xet installed,
huggingface_hub uploads nothing that way unless HF_HUB_DISABLE_XET is set, which the fixture and `environment` see to.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub.loopback.handler import Handler
from tests.hub.loopback.repository import BRANCH, TAG, Repository, StoredFile


@dataclass(frozen=True)
class Request:
    """What a client asked: "METHOD /path?query" unquoted, the headers in small letters, the bytes it sent.

    `status` is what was answered, 0 when the connection was cut before.
    """

    line: str
    headers: Mapping[str, str]
    received: int
    status: int


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose line the pattern fits; None is for ever."""

    pattern: str
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_upload: int | None = None
    cut_download: int | None = None


class LoopbackHub:
    """Serves until the `with` block ends.

    Attributes:
        users: user names by token. The owner of a namespace alone may write to it.
        readers: tokens that may not write anything, not even to their user's own repositories.
        repositories: by id.
        requests: all that was asked, in the order in which the answers began.
        lfs_above: files of more bytes than that are large ones, and so are all `*.safetensors`.
        part_size: large files of more bytes than that are uploaded in parts of as many.
        ignored: paths that a .gitignore would keep out of every commit.
        page_size: how many entries of a tree are listed at once.
    """

    def __init__(self) -> None:
        self.token, self.other_token, self.read_token = "loopback-owner", "loopback-other", "loopback-reader"
        self.users = {self.token: "someone", self.other_token: "other", self.read_token: "someone"}
        self.readers = {self.read_token}
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.lfs_above, self.part_size, self.page_size = 10_000_000, 100_000_000, 1000
        self.ignored: set[str] = set()
        self.parts: dict[tuple[str, int], bytes] = {}
        self._faults: list[Fault] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def create(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path | None = None,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Makes a repository with these files, or all of a directory; the id of its last commit."""
        repository = self.repositories[repo_id] = Repository(repo_id, private=private, gated=gated)
        return repository.refs[BRANCH + "main"] if files is None else self.commit(repo_id, files)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        *,
        deleted: tuple[str, ...] = (),
        branch: str = "main",
    ) -> str:
        """Adds files to a repository as someone else would do it; the id of the commit."""
        if isinstance(files, Path):
            paths = (path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories[repo_id]
        stored = {path: StoredFile(content, self.is_large(path, len(content))) for path, content in files.items()}
        repository.storage.update({file.sha256: file.content for file in stored.values() if file.lfs})
        return repository.commit(stored, deleted, ref=BRANCH + branch, message="by hand")[0].sha

    def tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        self._set(repo_id, TAG + name, revision)

    def branch(self, repo_id: str, name: str, revision: str = "main") -> None:
        self._set(repo_id, BRANCH + name, revision)

    def _set(self, repo_id: str, ref: str, revision: str) -> None:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, revision
        self.repositories[repo_id].refs[ref] = commit.sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files at a revision, but for the .gitattributes that every repository has."""
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, revision
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def head(self, repo_id: str, revision: str = "main") -> str:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, revision
        return commit.sha

    def is_large(self, path: str, size: int) -> bool:
        return size > self.lfs_above or (path.endswith(".safetensors") and size > 0)

    def fault(
        self,
        pattern: str,
        *,
        times: int | None = 1,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        cut_upload: int | None = None,
        cut_download: int | None = None,
    ) -> None:
        """Lets the next `times` requests that `pattern` fits (a regular expression for "METHOD /path") go wrong.

        They are answered by `status` with `headers`, or the connection is cut when `cut_upload` bytes were received or
        `cut_download` bytes of a file were sent. None as `times` is for ever, until `mend`.
        """
        self._faults.append(Fault(pattern, times, status, headers or {}, cut_upload, cut_download))

    def mend(self) -> None:
        self._faults.clear()

    def next_fault(self, line: str) -> Fault | None:
        """The fault that a request meets, which is then used up once."""
        with self.lock:
            for fault in self._faults:
                if fault.times != 0 and re.search(fault.pattern, line):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def asked(self, pattern: str) -> list[Request]:
        """The requests whose line the pattern fits."""
        with self.lock:
            return [request for request in self.requests if re.search(pattern, request.line)]

    def record(self, line: str, headers: Mapping[str, str], received: int, status: int) -> None:
        with self.lock:
            self.requests.append(Request(line, headers, received, status))
