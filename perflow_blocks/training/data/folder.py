"""A folder of pictures, with captions in JSON Lines files or in text files beside them."""

from __future__ import annotations

import os
from pathlib import Path

from .batch import Size
from .config import CAPTION_NAMES, DataConfig
from .json_lines import caption_name, read_json_lines
from .pictures import NO_CAPTION, SUFFIXES, BadPicture
from .records import as_captions

METADATA_NAMES = ("metadata.jsonl", "captions.jsonl")
"""Lines such as {"file_name": "a/1.png", "text": "a cat"}, the file as seen from where the JSON Lines file is."""

Captions = tuple[str, ...]


class FolderRecords:
    """All pictures of a folder and the folders in it, in the order of their paths.

    A picture's caption comes from a metadata.jsonl or captions.jsonl, else from a .txt file of its name. Files that
    these name but that are not there count as bad pictures.
    """

    def __init__(self, root: Path, pictures: list[tuple[Path, Captions | None]]) -> None:
        self.size: Size | None = None
        self._root = root
        self._pictures = pictures

    @classmethod
    def open(cls, config: DataConfig) -> FolderRecords:
        """Lists the files and reads the JSON Lines files.

        Raises:
            ValueError: no such folder, no pictures, no captions at all, or a bad JSON Lines file.
        """
        root = Path(config.path or "").expanduser()
        if not root.is_dir():
            raise ValueError(f"data.path={config.path!r} is not a folder; name the one that holds the pictures.")
        files = [Path(parent, name) for parent, _, names in os.walk(root, followlinks=True) for name in names]
        captions: dict[Path, Captions] = {}
        for path in sorted(file for file in files if file.name in METADATA_NAMES):
            captions |= _from_json_lines(path, config.caption_column)
        pictures = {file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")}
        if not pictures:
            raise ValueError(f"there are no pictures in {root}; looked for {', '.join(SUFFIXES)}.")
        if not any(captions.values()) and pictures.isdisjoint(captions) and not _with_text(pictures, set(files)):
            raise ValueError(
                f"there are no captions in {root}; put {' or '.join(METADATA_NAMES)} there, or a .txt file "
                "beside each picture."
            )
        chosen = sorted({*pictures, *captions})[: config.max_samples]
        return cls(root, [(picture, captions.get(picture)) for picture in chosen])

    def __len__(self) -> int:
        return len(self._pictures)

    def captions(self, index: int) -> Captions:
        picture, captions = self._pictures[index]
        if captions is not None:
            return captions
        try:
            return as_captions(" ".join(picture.with_suffix(".txt").read_text(encoding="utf-8-sig").split()))
        except (OSError, UnicodeDecodeError) as error:
            raise BadPicture(NO_CAPTION) from error

    def picture(self, index: int) -> Path:
        return self._pictures[index][0]

    def describe(self) -> str:
        return f"pictures in {self._root}"


def _with_text(pictures: set[Path], files: set[Path]) -> bool:
    return any(picture.with_suffix(".txt") in files for picture in pictures)


def _from_json_lines(path: Path, column: str | None) -> dict[Path, Captions]:
    found: dict[Path, Captions] = {}
    any_caption = False
    for row in read_json_lines(path):
        file_name = row.get("file_name")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f'{path} has a line without "file_name"; name the picture in each line.')
        name = caption_name(row, column)
        any_caption = any_caption or name is not None
        found[Path(os.path.normpath(path.parent / file_name))] = as_captions(row[name]) if name else ()
    if found and not any_caption:
        wanted = repr(column) if column else " or ".join(map(repr, CAPTION_NAMES))
        raise ValueError(f"no line of {path} has the key {wanted}; set data.caption_column.")
    return found
