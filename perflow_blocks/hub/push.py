"""Publishing a workflow: its files are searched for secrets, and huggingface_hub uploads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..blocks.block_source import INDEX, LOCATION, is_entry, require_sound, workflow_config
from ..blocks.saving import Problems
from ..delta.files import read_json
from .card import CARD, OWNER
from .export import MELLON

PLACEHOLDER = re.compile(rf'"{OWNER}/[^"\n]*"')
"""What a card names in place of the repository, where it was exported without `repo_id`."""

LEFT_OUT = (".git", ".cache", ".ipynb_checkpoints", "__pycache__", "*.pyc", ".DS_Store", ".gitattributes")
"""Names of files and folders that are not uploaded."""

CREDENTIALS = (".env*", ".npmrc", ".pypirc", ".netrc", ".git-credentials")
PRIVATE = (*CREDENTIALS, ".aws", ".ssh", "*.pem", "*.key", "id_[rd]sa*", "id_ecdsa*", "id_ed25519*")
"""Names of files and folders for which a directory is refused."""

TOKENS = {
    kind: re.compile(rb"(?<![A-Za-z0-9])(?:" + pattern + rb")")
    for kind, pattern in {
        "a Hugging Face token": rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
        "a GitHub token": rb"gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{40}",
        "an AWS key": rb"A[KS]IA[0-9A-Z]{16}",
        "an API key": rb"sk-(?=[A-Za-z_-]{,31}[0-9])[A-Za-z0-9_-]{32}|AIza[\w-]{35}",
        "an access token": rb"npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{40}|glpat-[\w-]{20}|xox[abp]-[\w-]{20}",
        "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----",
    }.items()
}

REPLACED = ("*.py", "*.json", "*.safetensors")
"""What the repository has of these and the directory has not is deleted: stale weights would be loaded again."""


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What a push uploaded, or a dry run would.

    Attributes:
        files: the size in bytes of each file, by its path in the repository.
        url: where to look at the result: the repository, the branch or the pull request.
        commit: the commit that holds the files; None after a dry run.
    """

    files: dict[str, int]
    url: str
    commit: str | None


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
    """Publishes a workflow on the Hub, in one commit. The repository is made if there is none.

    Card, index and Mellon's configuration are uploaded with the repository's id in them; the directory stays as it
    is. Code, JSON files and weights in the repository that the directory does not have are deleted; other files stay.

    Args:
        directory: what `export_workflow` or `save_pretrained` wrote.
        repo_id: "owner/name".
        private: whether a new repository is visible to its owners only; by default as the owner's account has it. A
            repository that exists must be so already.
        create_pr: opens a pull request instead of changing the branch.
        revision: the branch, or the pull request ("refs/pr/1"), to push to; by default main.
        token: an access token that may write; by default the one that huggingface_hub finds.
        commit_message: by default one that names the workflow's class.
        dry_run: only lists the files with their sizes, without a network.
        endpoint: the Hub's address; by default huggingface_hub's.

    Raises:
        ValueError: the directory is not a workflow or holds private files, tokens or links that lead out of it; there
            is no token, or it may not write; the repository does not exist but must, or `private` disagrees with it.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses something else.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"repo_id={repo_id!r} names no owner; pass owner/name.")
    root = Path(directory).expanduser()
    _, _, kind = workflow_config(root)
    paths = sorted(_listed(root))
    Problems(problem for path in paths for problem in _problems(root, path)).refuse("pushed")
    content: dict[str, Any] = {path: root / path for path in paths}
    content |= {path: text.encode() for path, text in _naming(root, paths, repo_id).items()}
    require_sound(root, portable=True, index=json.loads(content[INDEX]) if INDEX in content else None)
    token = (token or get_token() or "").strip()
    api = HfApi(endpoint=endpoint, token=token, library_name="perflow-blocks", library_version=__version__)
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
    sizes = {path: len(new) if isinstance(new, bytes) else new.stat().st_size for path, new in content.items()}
    if dry_run:
        return PushReport(files=sizes, url=url, commit=None)
    if not re.fullmatch(r"[\x21-\x7e]+", token):  # the error about a token with a line break would repeat it
        raise ValueError("no token for the Hub was found; run `hf auth login`, or pass token=.")
    try:
        if not create_pr and revision in (None, "main") and not api.repo_exists(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and api.repo_info(repo_id).private != private:
            raise ValueError(
                f"{repo_id} exists and is {'public' if private else 'private'}; change that in its settings, or "
                "leave private out."
            )
        there = set(api.list_repo_files(repo_id, revision=revision)) - content.keys()
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, new) for path, new in content.items()]
            + [CommitOperationDelete(path) for path in there if _matches(PurePath(path).name, REPLACED)],
            commit_message=commit_message or f"Push the workflow {kind}",
            revision=revision,
            create_pr=create_pr,
        )
    except HfHubHTTPError as error:
        if (advice := _advice(error, repo_id)) is None:
            raise
        raise ValueError(advice) from error
    return PushReport(files=sizes, url=done.pr_url or url, commit=done.oid)


def _advice(error: HfHubHTTPError, repo_id: str) -> str | None:
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id} does not exist, or the token may not see it; for a new repository push without create_pr and "
            "revision first, else check the name and the token."
        )
    match error.response.status_code:
        case 401:
            return "the Hub does not accept the token; run `hf auth login`, or pass another token."
        case 403:
            return f"the token may not write to {repo_id} ({error.server_message}); pass one that may write there."
    return None


def _listed(root: Path) -> Iterator[str]:
    """The POSIX paths of all files to upload, and of links to folders."""
    for file in root.rglob("*"):
        path = file.relative_to(root).as_posix()
        if (file.is_symlink() or not file.is_dir()) and not _matches(path, LEFT_OUT):
            yield path


def _matches(path: str, patterns: Collection[str]) -> bool:
    """Whether the name of a file, or of a folder that it is in, matches one of the patterns."""
    return any(fnmatch(part, pattern) for part in path.split("/") for pattern in patterns)


def _problems(root: Path, path: str) -> Iterator[str]:
    """A sentence for each reason against uploading a file. Tokens are not repeated."""
    file = root / path
    if _matches(path, PRIVATE):
        yield f"{path} is a private file; move it out of the directory."
    elif file.is_dir() or not file.resolve().is_relative_to(root.resolve()):
        yield f"{path} is a link that leads elsewhere; put a copy in its place."
    else:
        for line, kind in _tokens(file):
            place = "the metadata" if file.suffix == ".safetensors" else f"line {line}"
            yield f"{path} holds what looks like {kind} in {place}; take it out."


def _tokens(file: Path) -> Iterator[tuple[int, str]]:
    """Line and kind of each token in a text file, or in the header of a safetensors file."""
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            content = opened.read(min(int.from_bytes(opened.read(8), "little"), file.stat().st_size))
        else:
            content = opened.read(8192)
            content = b"" if b"\0" in content else content + opened.read()
    for kind, pattern in TOKENS.items():
        for match in pattern.finditer(content):
            yield content.count(b"\n", 0, match.start()) + 1, kind


def _naming(root: Path, paths: Collection[str], repo_id: str) -> dict[str, str]:
    """Index, card and Mellon's configuration with the repository's id, without which its weights do not load by id.

    A component whose folder is here belongs to this repository, as diffusers sees it when it loads a directory.
    """
    texts = {}
    if INDEX in paths:
        index = read_json(root / INDEX)
        folders = [path.rpartition("/")[0] for path in paths if "/" in path]
        for entry in filter(is_entry, index.values()):
            if entry[2].get("subfolder") in folders:
                entry[2].update({LOCATION: repo_id, "revision": None})
        texts[INDEX] = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    if MELLON in paths:
        mellon = {**read_json(root / MELLON), "default_repo": repo_id}
        texts[MELLON] = json.dumps(mellon, indent=2, ensure_ascii=False) + "\n"
    if CARD in paths:
        texts[CARD] = PLACEHOLDER.sub(f'"{repo_id}"', (root / CARD).read_text(encoding="utf-8"))
    return texts
