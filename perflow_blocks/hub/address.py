"""The id of a repository in its own index, without which weights that it holds do not load by id."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..components.files import atomic_path
from .json_files import INDEX, to_json
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
    index = json.loads((root / INDEX).read_text(encoding="utf-8"))
    wanted = addressed(index, repo_id, folders)
    if wanted == index:
        return manifest
    with atomic_path(root / INDEX) as temporary:
        temporary.write_text(to_json(wanted), encoding="utf-8")
    manifest = replace(manifest, files={**manifest.files, INDEX: file_entry(root / INDEX)})
    save_manifest(root, manifest)
    return manifest


def addressed(index: Mapping[str, Any], repo_id: str, folders: Collection[str]) -> dict[str, Any]:
    """The index with the repository's id in the entries of its own weights, which are those in its folders."""
    return {name: _addressed(value, repo_id, folders) for name, value in index.items()}


def _addressed(value: Any, repo_id: str, folders: Collection[str]) -> Any:
    is_entry = isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)
    if not is_entry or value[2].get("subfolder") not in folders:
        return value
    return [*value[:2], {**value[2], "pretrained_model_name_or_path": repo_id}]
