"""The repositories behind the loopback Hub: files under commits, branches, tags and pull requests, all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

BRANCH, TAG, REQUEST = "refs/heads/", "refs/tags/", "refs/pr/"


@dataclass(frozen=True)
class StoredFile:
    """A file's bytes, and whether they lie in the large file storage."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """git's object id: of the content, or of the pointer that stands for a large file."""
        text = self.content
        if self.lfs:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """A model repository.

    Attributes:
        repo_id: "owner/name".
        private: only the owner sees it.
        gated: everyone sees it; the files are for the owner and for those in `granted`.
        refs: what the full name of every branch, tag and pull request points to.
        commits: by their ids, in the order in which they were made.
        storage: the large files that were uploaded, by SHA-256, whether a commit names them or not.
    """

    repo_id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": StoredFile(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    def full_ref(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a pull request."""
        return next((ref for ref in (revision, BRANCH + revision, TAG + revision) if ref in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        ref = self.full_ref(revision)
        return self.commits.get(revision if ref is None else self.refs[ref])

    def commit(
        self,
        files: Mapping[str, StoredFile],
        deleted: Iterable[str] = (),
        *,
        ref: str = BRANCH + "main",
        message: str = "initial commit",
        pull_request: bool = False,
    ) -> tuple[Commit, str]:
        """Puts files over those of `ref` without the `deleted` ones; the commit, and the ref that points to it."""
        parent = self.commits[self.refs[ref]] if ref in self.refs else None
        gone = tuple(deleted)
        kept = {} if parent is None else {path: file for path, file in parent.files.items() if path not in gone}
        content = dict(sorted({**kept, **files}.items()))
        text = "\n".join([self.repo_id, message, parent.sha if parent else "", str(len(self.commits))])
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent.sha if parent else None, message, content)
        if pull_request:
            ref = f"{REQUEST}{1 + sum(name.startswith(REQUEST) for name in self.refs)}"
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made, ref
