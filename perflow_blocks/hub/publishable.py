"""What has to hold before a directory may be published."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from .manifest import Manifest, list_files, read_manifest, verify_manifest
from .private_content import PrivateContent

REPOSITORY_FILES = ("block.py", "modular_config.json", "modular_model_index.json")
"""Without these files diffusers loads nothing."""

_LEFTOVERS = {".cache", ".git", ".ipynb_checkpoints", "__pycache__", ".DS_Store", "Thumbs.db", ".env", ".netrc"}
_UNPUBLISHED = ".gitattributes"  # comes with every download; each repository on the Hub has one of its own


def require_publishable(directory: str | os.PathLike[str], secret: str | None = None) -> Manifest:
    """Checks that a directory is a workflow repository as it was exported, and holds nothing that is private.

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
    places = (root.absolute(), root.resolve(), Path(os.path.expanduser("~")), Path.cwd())
    search = PrivateContent(places, [secret] if secret else [])
    reported = set[str]()
    for path in sorted(list_files(root)):
        if leftover := _leftover(path):
            reported.add(f"{leftover} is not to be published; remove it, and export again.")
        elif path != _UNPUBLISHED:
            problems += _file_problems(root, path, manifest, search)
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


def _file_problems(root: Path, path: str, manifest: Manifest, search: PrivateContent) -> list[str]:
    if not (root / path).resolve().is_relative_to(root.resolve()):
        return [f"{path} is a link that leads out of the directory; put a copy of the file in its place."]
    if path not in manifest.files:
        return [f"{path} is not in the manifest; remove it, or export again."]
    try:
        return [f"{path}: {finding}; take it out, and export again." for finding in search.findings(root / path)]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); check its permissions."]
