"""What has to hold before a directory may be published."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from ..builder.problems import Problems, complaint
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
    problems = Problems()
    with problems.noted():
        verify_manifest(root, manifest, weights=True)
    missing = [name for name in REPOSITORY_FILES if name not in manifest.files]
    if missing:
        problems.add(f"{', '.join(missing)} is not in the manifest, and nothing loads without; export again.")
    places = (root.absolute(), root.resolve(), Path(os.path.expanduser("~")), Path.cwd())
    search = PrivateContent(places, [secret] if secret else [])
    for path in sorted(list_files(root)):
        if path != _UNPUBLISHED:
            _check_file(root, path, manifest, search, problems)
    if problems:
        raise ValueError(complaint(list(problems), "nothing was pushed"))
    return manifest


def _check_file(root: Path, path: str, manifest: Manifest, search: PrivateContent, problems: Problems) -> None:
    parts = PurePosixPath(path).parts
    leftover = next((depth for depth, part in enumerate(parts, 1) if part in _LEFTOVERS or part.endswith(".pyc")), 0)
    if leftover:
        problems.add(f"{'/'.join(parts[:leftover])} is not to be published; remove it, and export again.")
    elif not (root / path).resolve().is_relative_to(root.resolve()):
        problems.add(f"{path} is a link that leads out of the directory; put a copy of the file in its place.")
    elif path not in manifest.files:
        problems.add(f"{path} is not in the manifest; remove it, or export again.")
    else:
        with problems.noted(about=f"{path}: "):
            for finding in search.findings(root / path):
                problems.add(f"{path}: {finding}; take it out, and export again.")
