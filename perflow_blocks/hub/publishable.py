"""What has to hold before a directory may be published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from .manifest import Manifest, list_files, read_manifest, verify_manifest

REPOSITORY_FILES = ("block.py", "modular_config.json", "modular_model_index.json")
"""Without these files diffusers loads nothing."""

_LEFTOVERS = {".cache", ".git", ".ipynb_checkpoints", "__pycache__", ".DS_Store", "Thumbs.db", ".env", ".netrc"}
_UNPUBLISHED = ".gitattributes"  # comes with every download; each repository on the Hub has one of its own

_TOKENS = {
    "a Hugging Face token": rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{40}",
    "an AWS key": rb"AKIA[0-9A-Z]{16}",
    "an API key": rb"sk-[A-Za-z0-9_-]{32}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_HOMES = rb"/(?:home|Users)/[\w.-]+|/root/[\w.-]+|[A-Za-z]:[\\/]{1,2}Users[\\/]{1,2}[\w.-]+"


def require_publishable(directory: str | os.PathLike[str], secret: str | None = None) -> Manifest:
    """Checks that a directory is a workflow repository as it was exported, and holds no tokens and paths of users.

    Reads every file, weights too. `secret` is a token that must not stand in any of them.

    Raises:
        ValueError: every reason against it, with the files' names.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"{directory} is no directory; name one that export_workflow wrote.")
    manifest = read_manifest(root)
    problems = []
    try:
        verify_manifest(root, manifest, weights=True)
    except ValueError as error:
        problems.append(str(error))
    missing = [name for name in REPOSITORY_FILES if name not in manifest.files]
    if missing:
        problems.append(f"{', '.join(missing)} is not in the manifest, and nothing loads without; export again.")
    reported = set[str]()
    for path in sorted(list_files(root)):
        if leftover := _leftover(path):
            reported.add(f"{leftover} is not to be published; remove it, and export again.")
        elif path != _UNPUBLISHED:
            problems += _file_problems(root, path, manifest, secret)
    problems += sorted(reported)
    if problems:
        raise ValueError("\n- ".join([f"nothing was pushed, since {root} cannot be published:", *problems]))
    return manifest


def _leftover(path: str) -> str | None:
    """The file or directory on the way to `path` that no repository should hold."""
    parts = PurePosixPath(path).parts
    found = (depth for depth, part in enumerate(parts, 1) if part in _LEFTOVERS or part.endswith(".pyc"))
    depth = next(found, None)
    return None if depth is None else "/".join(parts[:depth])


def _file_problems(root: Path, path: str, manifest: Manifest, secret: str | None) -> list[str]:
    if not (root / path).resolve().is_relative_to(root.resolve()):
        return [f"{path} is a link that leads out of the directory; put a copy of the file in its place."]
    if path not in manifest.files:
        return [f"{path} is not in the manifest; remove it, or export again."]
    try:
        return [f"{path}: {found}; take it out, and export again." for found in private_content(root / path, secret)]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); check its permissions."]


def private_content(path: Path, secret: str | None = None) -> Iterator[str]:
    """A clause for every token and every path in a user's home, such as "line 3 names the path /home/me".

    Of weights (`.safetensors`) the metadata are read, of other files all. Tokens are never repeated.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            content = file.read(min(length, path.stat().st_size))
        else:
            content = file.read()
    known = {kind: rb"(?<![A-Za-z0-9])(?:" + pattern + rb")" for kind, pattern in _TOKENS.items()}
    if secret:
        known["the token that is in use"] = re.escape(secret.encode())
    found = [
        (match.start(), f"holds what looks like {kind} ({match[0][:3].decode(errors='replace')}...)")
        for kind, pattern in known.items()
        for match in re.finditer(pattern, content)
    ]
    for match in re.finditer(rb"(?<![\w./~-])(?:" + _HOMES + rb")", content):
        found.append((match.start(), f"names the path {match[0].decode(errors='replace')}"))
    for position, clause in sorted(found):
        line = content.count(b"\n", 0, position) + 1
        yield clause if path.suffix == ".safetensors" else f"line {line} {clause}"
