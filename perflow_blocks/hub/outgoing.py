"""The files that a push sends: those of the directory, in the form that they have in the repository."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .address import addressed_files
from .manifest import MANIFEST, Manifest, bytes_entry, file_entry


@dataclass(frozen=True, kw_only=True)
class OutgoingFile:
    """A file's content, where to read it or as it is; its SHA-256 and its size in bytes."""

    content: Path | bytes
    sha256: str
    size: int

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def outgoing_files(directory: str | os.PathLike[str], manifest: Manifest, repo_id: str) -> dict[str, OutgoingFile]:
    """What the repository will hold, by path; the manifest, of the other files as they are sent, is the last.

    Args:
        directory: a workflow that was compared with its manifest. It stays as it is.
        manifest: that manifest.
        repo_id: the repository, which some of the files name.

    Raises:
        ValueError: a file that names the repository cannot be read.
    """
    root, addressed = Path(directory), addressed_files(directory, repo_id)
    files = {}
    for path, entry in {**manifest.files, MANIFEST: file_entry(root / MANIFEST)}.items():
        content = addressed.get(path)
        sent = entry if content is None else bytes_entry(content)
        files[path] = OutgoingFile(
            content=root / path if content is None else content, sha256=sent.sha256, size=sent.size
        )
    return files
