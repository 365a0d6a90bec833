"""The id of a repository in its own files: without it, weights that it holds do not load by id.

It stands in the index's entries of these weights, in Mellon's configuration, and in the loading calls of the card.
Mellon's `default_repo` is also where the id that a directory was exported for is remembered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .json_files import INDEX, MELLON, parse_json, to_json
from .manifest import MANIFEST, bytes_entry, manifest_bytes, read_manifest

CARD = "README.md"

OWNER = "your-name"
"""Whom a card names where the repository is not known yet."""


def require_repo_id(repo_id: str) -> None:
    """Checks that it can be the id of a user's repository, "owner/name".

    Raises:
        ValueError: it cannot.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository ({error}); pass owner/name.") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner; pass owner/name.")


def addressed_files(directory: str | os.PathLike[str], repo_id: str) -> dict[str, bytes]:
    """The files that read differently in this repository than in the directory, the manifest with their hashes too.

    Nothing is written. To be called with a directory that was compared with its manifest. Empty where the directory
    names this repository already, or has no place for a name.

    Raises:
        ValueError: the manifest or a file cannot be read.
    """
    root = Path(directory)
    manifest = read_manifest(root)
    read = {name: (root / name).read_bytes() for name in (INDEX, MELLON, CARD) if name in manifest.files}
    mellon = parse_json(read[MELLON], str(root / MELLON)) if MELLON in read else {}
    former = str(mellon.get("default_repo") or "")
    changed = {}
    if INDEX in read:
        index = parse_json(read[INDEX], str(root / INDEX))
        folders = {path.split("/")[0] for path in manifest.files if "/" in path}
        changed[INDEX] = _text(index, addressed_index(index, repo_id, folders, former))
    if MELLON in read:
        changed[MELLON] = _text(mellon, {**mellon, "default_repo": repo_id})
    if CARD in read:
        changed[CARD] = addressed_card(read[CARD], repo_id, former)
    new = {name: content for name, content in changed.items() if content is not None and content != read[name]}
    if not new:
        return {}
    files = {**manifest.files, **{name: bytes_entry(content) for name, content in new.items()}}
    return {**new, MANIFEST: manifest_bytes(replace(manifest, files=files))}


def addressed_index(
    index: Mapping[str, Any], repo_id: str, folders: Collection[str], former: str = ""
) -> dict[str, Any]:
    """The index with the repository's id in the entries of its own weights.

    These are in one of its folders, and name no repository, or the one that the export was addressed to before. An
    entry that names another one keeps it, also where the folder there is called as one here.
    """
    return {name: _addressed(value, repo_id, folders, former) for name, value in index.items()}


def _addressed(value: Any, repo_id: str, folders: Collection[str], former: str) -> Any:
    is_entry = isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)
    if not is_entry or value[2].get("subfolder") not in folders:
        return value
    if (value[2].get("pretrained_model_name_or_path") or former) != former:
        return value
    return [*value[:2], {**value[2], "pretrained_model_name_or_path": repo_id}]


def addressed_card(card: bytes, repo_id: str, former: str = "") -> bytes:
    """The card with the repository's id in the calls that load it, in place of the former one or a placeholder."""
    name = re.escape(former.encode()) if former else re.escape(OWNER.encode()) + rb"/[^\"\n]*"
    calls = rb"((?:from_pretrained|load_workflow)\(\")" + name + rb"(?=\")"
    return re.sub(calls, lambda call: call[1] + repo_id.encode(), card)


def _text(before: Mapping[str, Any], after: Mapping[str, Any]) -> bytes | None:
    """The JSON; None where nothing is new, so that a file keeps the form that it has."""
    return None if before == after else to_json(after).encode()
