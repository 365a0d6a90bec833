"""The id of a repository in its own index, without which weights that it holds do not load by id."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from ..components.files import atomic_path
from .index import INDEX, addressed, to_json
from .manifest import Manifest, file_entry, read_manifest, save_manifest


def address_workflow(directory: str | os.PathLike[str], repo_id: str) -> Manifest:
    """Writes the id into the index's entries of the workflow's own weights, and the index's hash into the manifest.

    Loaded from a directory, such entries find their folders. Loaded by id, diffusers skips an entry that names no
    repository. To be called with a directory that was compared with its manifest. Changes nothing where there is
    nothing to change.

    Raises:
        ValueError: the manifest or a file cannot be read or written.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    folders = {path.split("/")[0] for path in manifest.files if "/" in path}
    text = (root / INDEX).read_text(encoding="utf-8")
    wanted = to_json(addressed(json.loads(text), repo_id, folders))
    if wanted == text:
        return manifest
    with atomic_path(root / INDEX) as temporary:
        temporary.write_text(wanted, encoding="utf-8")
    manifest = replace(manifest, files={**manifest.files, INDEX: file_entry(root / INDEX)})
    save_manifest(root, manifest)
    return manifest
