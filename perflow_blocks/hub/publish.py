"""Publishing a workflow repository: checked, uploaded and put in place by one commit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from .. import __version__
from .address import require_repo_id
from .errors import explained
from .outgoing import OutgoingFile, outgoing_files
from .publishable import require_publishable
from .remote import Remote, list_remote, read_remote

Change = Literal["new", "changed", "unchanged", "deleted"]


@dataclass(frozen=True, kw_only=True)
class PushedFile:
    """A file, its size in bytes (0 for a deleted one), and what the push does to the one in the repository."""

    path: str
    size: int
    change: Change


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What a push did, or would do.

    Attributes:
        repo_id: the repository, "owner/name".
        files: all files of the workflow, and those that are deleted since the former workflow had them.
        url: where to look at the result: the repository or branch, or the pull request.
        commit: the commit that holds these files; None after a dry run that found changes.
        dry_run: whether nothing was done.
        compared: whether the repository could be looked at; where a dry run could not, every file counts as new.
    """

    repo_id: str
    files: tuple[PushedFile, ...]
    url: str
    commit: str | None
    dry_run: bool
    compared: bool = True

    @property
    def changes(self) -> tuple[PushedFile, ...]:
        return tuple(file for file in self.files if file.change != "unchanged")

    @property
    def up_to_date(self) -> bool:
        """Whether the repository held all of it before, so that there was nothing to commit."""
        return not self.changes

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def uploaded_bytes(self) -> int:
        """The size of what is new or changed; the Hub may know some of it from elsewhere, which is not sent then."""
        return sum(file.size for file in self.changes)


def push_workflow(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> PushReport:
    """Publishes a workflow repository on the Hub, in a single commit, or not at all.

    Before the network is asked for anything, every file is compared with the manifest and searched for tokens and
    users' paths. Index, card and Mellon's configuration are sent with the repository's id in them; the directory stays
    as it is, and serves for other repositories too. The repository is made if there is none. Files of a workflow that
    was there before and that this one does not have are removed; what others put there stays. Large files go first and
    the commit comes last: after an interruption the repository is as it was, and the next attempt does not send again
    what had arrived.

    Args:
        directory: what `export_workflow` wrote.
        repo_id: "owner/name".
        private: whether a new repository is visible to its owners only; by default as the owner's account has it. Of
            a repository that exists it has to be true already, since its visibility is not changed.
        create_pr: opens a pull request instead of changing the branch.
        revision: the branch, or the pull request ("refs/pr/1"), to push to; by default main.
        token: an access token that may write; by default the one that huggingface_hub finds.
        commit_message: by default one that names the workflow's class.
        dry_run: only says what would be done. It needs no token, but without one sees no private repository; without
            a network it says what the workflow consists of.
        endpoint: the Hub's address; by default huggingface_hub's.

    Raises:
        ValueError: the directory is not fit to be published, no token was found, or the Hub does not allow it.
        ConnectionError: the network or the Hub failed; pushing again completes what was begun.
    """
    require_repo_id(repo_id)
    token = _usable_token(token, required=not dry_run)
    manifest = require_publishable(directory, token)
    outgoing = outgoing_files(directory, manifest, repo_id)
    api = HfApi(endpoint=endpoint, token=token or False, library_name="perflow-blocks", library_version=__version__)
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
    try:
        with explained(repo_id, api.endpoint):
            remote = _remote(api, repo_id, revision, private=private, create_pr=create_pr)
    except ConnectionError:
        if not dry_run:
            raise
        files = _compare(outgoing, Remote())
        return PushReport(repo_id=repo_id, files=files, url=url, commit=None, dry_run=True, compared=False)
    with explained(repo_id, api.endpoint):
        files = _compare(outgoing, remote)
        if dry_run or all(file.change == "unchanged" for file in files):
            sha = None if any(file.change != "unchanged" for file in files) else remote.sha
            return PushReport(repo_id=repo_id, files=files, url=url, commit=sha, dry_run=dry_run)
        if remote.sha is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
            remote = read_remote(api, repo_id, None)
        message = commit_message or f"Push the workflow {manifest.blocks}"
        done = api.create_commit(
            repo_id,
            _operations(outgoing, files),
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=remote.sha,  # what was compared; a commit that came between is an error
        )
        _require_published(outgoing, Remote(files=list_remote(api, repo_id, done.oid)), done)
    return PushReport(repo_id=repo_id, files=files, url=done.pr_url or url, commit=done.oid, dry_run=False)


def _usable_token(token: str | None, *, required: bool) -> str | None:
    """The token, else the one that huggingface_hub finds. Never repeated in an error, also not by the HTTP library."""
    token = token or get_token()
    if token is None and required:
        raise ValueError("no token for the Hub was found; run `hf auth login`, or pass token=.")
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError("the token holds spaces or characters that no token has; copy it again.")
    return token


def _remote(api: HfApi, repo_id: str, revision: str | None, *, private: bool | None, create_pr: bool) -> Remote:
    """What the repository holds at the revision, once it is clear that one may push there.

    Raises:
        ValueError: the revision is no branch and no pull request, or the repository's visibility is another.
    """
    remote = read_remote(api, repo_id, None)
    if remote.sha is None:
        if create_pr or revision not in (None, "main"):
            what = "a pull request needs" if create_pr else f"the branch {revision} would be in"
            raise ValueError(f"{repo_id} does not exist, and {what} a repository; push without it first.")
        return remote
    if private is not None and private != remote.private:
        is_now = "private" if remote.private else "public"
        raise ValueError(f"{repo_id} exists and is {is_now}; change that in its settings, or leave private out.")
    if revision is None:
        return remote
    if create_pr and revision.startswith("refs/pr/"):
        raise ValueError(f"revision {revision} is a pull request; leave create_pr out to push to it.")
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    names = [*(branch.name for branch in refs.branches), *(request.ref for request in refs.pull_requests or ())]
    if revision not in names:
        raise ValueError(f"{repo_id} has no branch {revision}; pass one of {', '.join(names)}.")
    return read_remote(api, repo_id, revision)


def _compare(outgoing: Mapping[str, OutgoingFile], remote: Remote) -> tuple[PushedFile, ...]:
    files = []
    for path, file in outgoing.items():
        same = remote.holds(path, file)
        change: Change = "unchanged" if same else "changed" if path in remote.files else "new"
        files.append(PushedFile(path=path, size=file.size, change=change))
    stale = sorted(remote.workflow & remote.files.keys() - {file.path for file in files})
    return (*files, *(PushedFile(path=path, size=0, change="deleted") for path in stale))


def _operations(
    outgoing: Mapping[str, OutgoingFile], files: tuple[PushedFile, ...]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    return [
        CommitOperationDelete(file.path)
        if file.change == "deleted"
        else CommitOperationAdd(file.path, outgoing[file.path].content)
        for file in files
        if file.change != "unchanged"
    ]


def _require_published(outgoing: Mapping[str, OutgoingFile], remote: Remote, done: CommitInfo) -> None:
    """Compares what the Hub holds with what was sent: it leaves out files that a .gitignore of the repository names.

    Raises:
        ValueError: names the files that are not there, or not as they are here.
    """
    wrong = [path for path, file in outgoing.items() if not remote.holds(path, file)]
    if wrong:
        raise ValueError(
            f"commit {done.oid} does not hold {', '.join(wrong)} as the manifest says; look whether the repository's "
            ".gitignore names them or the files changed during the push, and push again."
        )
