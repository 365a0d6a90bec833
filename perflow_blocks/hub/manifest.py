"""The manifest of a workflow repository: what it runs, and the size and SHA-256 of every file in it.

It stands in the repository as `perflow_manifest.json`. Whoever loads the repository compares the files with it before
any code runs, so that a damaged download, an edited file or a stray module is found by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from .. import __version__
from ..atomic_files import atomic_path

MANIFEST = "perflow_manifest.json"
MODES = ("self-contained", "thin")
_KEYS = ("blocks", "mode", "package_version", "files")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file's content: its SHA-256 in 64 lower-case hexadecimal digits, and its size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256={self.sha256!r} is no SHA-256; 64 lower-case hexadecimal digits are needed.")
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f"size={self.size!r} is no number of bytes; a whole number of at least 0 is needed.")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a workflow repository is.

    Attributes:
        blocks: the class of its blocks, such as "block.MyBlocks" or "MyBlocks".
        mode: "self-contained" (needs diffusers only) or "thin" (needs this package).
        package_version: the version of this package that wrote it.
        files: all files but the manifest by their POSIX paths, relative to the repository.
    """

    blocks: str
    mode: str
    package_version: str
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, str) or not all(part.isidentifier() for part in self.blocks.split(".")):
            raise ValueError(f"blocks={self.blocks!r} names no class; a name such as block.MyBlocks is needed.")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown; one of {', '.join(MODES)} is needed.")
        if not isinstance(self.package_version, str) or not self.package_version:
            raise ValueError(f"package_version={self.package_version!r} is no version; one such as 0.1.0 is needed.")
        for path in self.files:
            _require_inside(path)


_LOADED = (".py", ".so", ".pyd", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".index.json")
"""Ends of the names of files that libraries load without being told to."""


def write_manifest(directory: str | os.PathLike[str], *, blocks: str, mode: str) -> Manifest:
    """Reads every file in the directory and writes the manifest over them; it appears complete or not at all.

    Raises:
        ValueError: `blocks` or `mode` make no sense, or the directory holds no files, links to directories, or files
            that cannot be read.
    """
    root = Path(directory)
    found = sorted(list_files(root))
    linked = [path for path in found if (root / path).is_dir()]
    if linked or not found:
        reason = f"holds links to directories ({', '.join(linked)})" if linked else "holds no files"
        raise ValueError(f"no manifest can be written for {root}: it {reason}; put the files themselves there.")
    try:
        files = {path: file_entry(root / path) for path in found}
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}; remove it or mend it.") from error
    manifest = Manifest(blocks=blocks, mode=mode, package_version=__version__, files=files)
    save_manifest(root, manifest)
    return manifest


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes a manifest as it is, compared with nothing."""
    with atomic_path(directory / MANIFEST) as temporary:
        temporary.write_bytes(manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of its file."""
    return (json.dumps(asdict(manifest), indent=2) + "\n").encode()


def file_entry(path: Path) -> FileEntry:
    """What a manifest says of a file as it is now."""
    return FileEntry(sha256=sha256_of(path), size=path.stat().st_size)


def bytes_entry(content: bytes) -> FileEntry:
    """What a manifest says of a file with this content."""
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of a workflow repository's directory; compares nothing with it.

    Raises:
        ValueError: there is none, it cannot be read, its keys or values are wrong, or it names paths outside.
    """
    path = Path(directory) / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{directory} holds no {MANIFEST}; name a directory that export_workflow wrote.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check its permissions.") from error


def parse_manifest(text: bytes, name: str = MANIFEST) -> Manifest:
    """The manifest that the text is; `name` stands in the errors.

    Raises:
        ValueError: as for `read_manifest`.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or sorted(values) != sorted(_KEYS) or not isinstance(values["files"], dict):
            raise ValueError(f"it needs the keys {', '.join(_KEYS)} and no others")
        return Manifest(**{**values, "files": {path: _entry(path, value) for path, value in values["files"].items()}})
    except (ValueError, RecursionError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{name} is no manifest of a workflow: {reason}; download or export it again.") from error


def verify_manifest(
    directory: str | os.PathLike[str],
    manifest: Manifest | None = None,
    *,
    weights: bool = False,
    only: Collection[str] | None = None,
) -> Manifest:
    """Compares a directory with its manifest.

    Files that the manifest does not name are taken for harmless, except code and weights, whatever is in a folder of
    the manifest's, where a library may find it, and links to directories.

    Args:
        directory: the workflow repository.
        manifest: the manifest to trust; by default the one in the directory.
        weights: also read weights (`*.safetensors`), of which otherwise only the size is compared.
        only: the paths that have to be there, when not everything was downloaded; what is there is compared all the
            same. By default all that the manifest names.

    Raises:
        ValueError: names every file that is changed, missing or unexpected, or that cannot be read; or the manifest
            cannot be read.
    """
    root = Path(directory)
    manifest = read_manifest(root) if manifest is None else manifest
    present = set(list_files(root))
    wanted = manifest.files if only is None else only
    folders = {path.split("/")[0] for path in manifest.files if "/" in path}
    unexpected = (
        path
        for path in present - manifest.files.keys()
        if path.lower().endswith(_LOADED) or (root / path).is_dir() or _is_beside(path, folders)
    )
    findings = {
        "changed": _changed(root, manifest, present, weights),
        "missing": [path for path in manifest.files if path not in present and path in wanted],
        "unexpected": sorted(unexpected),
    }
    if any(findings.values()):
        text = ", ".join(f"{len(paths)} {what} ({', '.join(paths)})" for what, paths in findings.items() if paths)
        raise ValueError(f"{root} is not what its {MANIFEST} says: {text}; download or export it again.")
    return manifest


def _is_beside(path: str, folders: Collection[str]) -> bool:
    """Whether a file is in one of the folders; hidden ones (".DS_Store") are read by nobody."""
    parts = path.split("/")
    return len(parts) > 1 and parts[0] in folders and not parts[-1].startswith(".")


def list_files(directory: Path) -> Iterator[str]:
    """The POSIX paths of all files but the manifest, and of links to directories, which are not followed."""
    for folder, subfolders, names in os.walk(directory):
        links = [name for name in subfolders if (Path(folder) / name).is_symlink()]
        for name in [*names, *links]:
            path = (Path(folder) / name).relative_to(directory).as_posix()
            if path != MANIFEST:
                yield path


def _changed(root: Path, manifest: Manifest, present: Collection[str], weights: bool) -> list[str]:
    """The files that are not as the manifest says; on a terminal a bar shows how far it is, when weights are read."""
    total = sum(entry.size for entry in manifest.files.values())
    changed = []
    with tqdm(total=total, desc="Check files", unit="B", unit_scale=True, disable=None if weights else True) as bar:
        for path, entry in manifest.files.items():
            if path in present and _differs(root, path, manifest, weights):
                changed.append(path)
            bar.update(entry.size)
    return changed


def _differs(root: Path, path: str, manifest: Manifest, weights: bool) -> bool:
    file, entry = root / path, manifest.files[path]
    try:
        if not file.is_file() or file.stat().st_size != entry.size:
            return True
        return (weights or file.suffix != ".safetensors") and sha256_of(file) != entry.sha256
    except OSError:
        return True


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits; reads it piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: str, value: Any) -> FileEntry:
    if not isinstance(value, dict) or value.keys() != {"sha256", "size"}:
        raise ValueError(f"{path} needs the keys sha256 and size and no others")
    try:
        return FileEntry(**value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _require_inside(path: str) -> None:
    """Refuses what is no plain relative POSIX path, also as Windows reads it."""
    parts = path.split("/")
    if path == MANIFEST or any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", path):
        raise ValueError(f"path {path!r} is not allowed; paths have to be relative, below the repository, with '/'.")
