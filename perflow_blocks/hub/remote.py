"""What a repository on the Hub holds now, to compare a directory with it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from .manifest import MANIFEST, parse_manifest
from .outgoing import OutgoingFile


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A repository at one commit.

    Attributes:
        sha: the commit; None when there is no repository.
        private: whether others can see it.
        files: all its files by path.
        workflow: the paths that its manifest names, so that they came from a workflow; empty without one.
    """

    sha: str | None = None
    private: bool | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    workflow: frozenset[str] = frozenset()

    def holds(self, path: str, file: OutgoingFile) -> bool:
        """Whether the repository has this content under this path."""
        there = self.files.get(path)
        if there is None or there.size != file.size:
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == file.sha256
        return there.blob_id == git_hash(file.read())  # a small file; those are stored by git's own hash


def read_remote(api: HfApi, repo_id: str, revision: str | None) -> Remote:
    """What the Hub says, at the head of a branch or at a commit; an empty `Remote` when there is no repository."""
    try:
        info = api.repo_info(repo_id, revision=revision)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote()
    files = list_remote(api, repo_id, info.sha)
    workflow: frozenset[str] = frozenset()
    if MANIFEST in files:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(api.hf_hub_download(repo_id, MANIFEST, revision=info.sha, local_dir=folder))
            try:
                workflow = frozenset([*parse_manifest(path.read_bytes()).files, MANIFEST])
            except ValueError:
                pass  # then nothing is known to be a workflow's, and nothing will be removed
    return Remote(sha=info.sha, private=info.private, files=files, workflow=workflow)


def list_remote(api: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
