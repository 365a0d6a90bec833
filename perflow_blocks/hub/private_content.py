"""What a file must not tell the world: access tokens, and paths of the machine that it was written on."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

_TOKENS = {
    "a Hugging Face token": rb"hf_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{40}",
    "an AWS key": rb"AKIA[0-9A-Z]{16}",
    "an API key": rb"sk-[A-Za-z0-9_-]{32}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_PATHS = (
    rb"/(?:home|Users)/[\w.-]+",
    rb"/root/[\w.-]+",
    rb"file:/+\w",
    # Backslashes are doubled in JSON. A folder or an ending has to follow, since "n:\n" stands in many a source file.
    rb"[A-Za-z]:(?:\\{1,2}|/)[^\\/:*?\"<>|\s]+(?:\\|/|\.\w)",
)
# In code and prose these hold in quotes alone, since without them much that is no path looks like one.
_QUOTED = (
    rb"/(?:tmp|data|mnt|media|opt|srv|var|scratch|workspace|content|Volumes|private)/[^\"'`\n]*[\w}][^\"'`\n]*",
    # A server and its share; the backslashes are doubled in usual string literals.
    rb"\\{2}[\w.-]{2,}\\[\w$.-]{2,}[^\"'`\n]*",
    rb"\\{4}[\w.-]{2,}\\{2}[\w$.-]{2,}[^\"'`\n]*",
)
_ANY_QUOTED = re.compile(rb"(?<=[\"'`])/[^\"'`\n]+(?=[\"'`])")
# What every system has says nothing of this one.
_SYSTEM = re.compile(
    rb"/(?:bin|dev|etc|lib(?:32|64)?|proc|sbin|sys|usr/(?:bin|lib|lib32|lib64|sbin|share))(?:/.*)?"
    rb"|/(?:boot|home|media|mnt|opt|root|run|srv|tmp|usr|usr/local|var)?/*"
)
# In JSON a value is known from a piece of text, so that there any path from the root counts.
_JSON_VALUE = rb"(?<=\")/[^/\"\s]+/[^\"\s]*(?=\"\s*[,}\]])"
_REST = rb"[^\s\"'`<>|(){}\[\],;*?]*"  # of a path, after what gave it away
_VOCABULARIES = {"merges.txt", "tokenizer.json", "vocab.json"}  # pieces of words, among them pieces of paths
_TEXT_SAMPLE = 8192


class PrivateContent:
    """Looks into files for tokens and local paths.

    A local path is known by its beginning, or by being one of this machine.

    Args:
        paths: paths of this machine that are to be found wherever they lie, such as the directory that is published.
        secrets: texts to find besides what has a token's form; they are never repeated.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]] = (), secrets: Iterable[str] = ()) -> None:
        known = dict(_TOKENS)
        if exact := [re.escape(secret.encode()) for secret in secrets if secret]:
            known["the token that is in use"] = b"|".join(exact)
        self._tokens = {kind: re.compile(rb"(?<![A-Za-z0-9])(?:" + pattern + rb")") for kind, pattern in known.items()}
        literal = {form.encode() for path in paths if len(PurePath(path).parts) > 2 for form in _forms(str(path))}
        own = [re.escape(path) + rb"(?![\w-])" for path in sorted(literal, key=len, reverse=True)]
        forms = rb"(?<![\w./~-])(?:" + b"|".join([*own, *_PATHS]) + rb")" + _REST
        self._text = re.compile(forms + rb"|(?<=[\"'`])(?:" + b"|".join(_QUOTED) + rb")")
        self._json = re.compile(forms + rb"|" + _JSON_VALUE)

    def findings(self, path: Path) -> Iterator[str]:
        """A clause for everything that is found, such as "line 3 names the local path /home/me/models".

        Of weights (`.safetensors`) the metadata are read, of other files all; paths are looked for in text alone.

        Raises:
            OSError: the file cannot be read.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if path.suffix == ".safetensors":
                    end = min(8 + int.from_bytes(content[:8], "little"), size)
                    yield from self._search(content, 8, end, self._json)
                elif b"\0" in content[:_TEXT_SAMPLE] or path.name in _VOCABULARIES:
                    yield from self._search(content, 0, size, None)
                else:
                    yield from self._search(content, 0, size, self._json if path.suffix == ".json" else self._text)

    def _search(self, content: mmap.mmap, start: int, end: int, paths: re.Pattern[bytes] | None) -> Iterator[str]:
        found = {}
        for kind, pattern in self._tokens.items():
            for match in pattern.finditer(content, start, end):
                found[match.start()] = f"holds what looks like {kind} ({match[0][:3].decode(errors='replace')}...)"
        for match in paths.finditer(content, start, end) if paths else ():
            found[match.start()] = f"names the local path {match[0].decode(errors='replace')}"
        for match in _ANY_QUOTED.finditer(content, start, end) if paths is self._text else ():
            if not _SYSTEM.fullmatch(match[0]) and os.path.lexists(match[0]):
                found[match.start()] = f"names the local path {match[0].decode(errors='replace')}"
        for position, clause in sorted(found.items()):
            line = content[start:position].count(b"\n") + 1
            yield f"line {line} {clause}" if start == 0 else clause


def _forms(path: str) -> set[str]:
    """A path as it may stand in a text: as it is, with slashes, and with the doubled backslashes of JSON."""
    return {path, PurePath(path).as_posix(), path.replace("\\", "\\\\")}
