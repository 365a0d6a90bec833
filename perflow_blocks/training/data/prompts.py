"""Prompts without pictures, from a text file or a JSON Lines file."""

from __future__ import annotations

from pathlib import Path

from .batch import Size
from .config import CAPTION_NAMES, DataConfig
from .json_lines import caption_name, read_json_lines, read_lines
from .records import as_captions


class PromptRecords:
    """A prompt a line of a .txt file, or an object a line of a .jsonl file. Time ids are those of whole squares."""

    def __init__(self, path: str, prompts: list[tuple[str, ...]], resolution: int) -> None:
        self.size: Size | None = (resolution, resolution)
        self._path = path
        self._prompts = prompts

    @classmethod
    def open(cls, config: DataConfig) -> PromptRecords:
        """Reads the file.

        Raises:
            ValueError: there is no such file, it is neither .txt nor .jsonl, or holds no prompts.
        """
        path = Path(config.path or "").expanduser()
        if not path.is_file():
            raise ValueError(f"data.path={config.path!r} is not a file; name a .txt or .jsonl file with prompts.")
        match path.suffix.lower():
            case ".txt":
                prompts: list[tuple[str, ...]] = [(line.strip(),) for line in read_lines(path) if line.strip()]
            case ".jsonl":
                prompts = _from_json_lines(path, config.caption_column)
            case _:
                raise ValueError(f"data.path={config.path!r} is neither .txt nor .jsonl; give one prompt a line.")
        prompts = prompts[: config.max_samples]
        if not any(prompts):
            raise ValueError(f"there are no prompts in {path}; give one a line.")
        return cls(str(path), prompts, config.resolution)

    def __len__(self) -> int:
        return len(self._prompts)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._prompts[index]

    def picture(self, index: int) -> None:
        return None

    def describe(self) -> str:
        return f"prompts in {self._path}"


def _from_json_lines(path: Path, column: str | None) -> list[tuple[str, ...]]:
    rows = read_json_lines(path)
    names = [caption_name(row, column) for row in rows]
    if rows and not any(names):
        keys = ", ".join(sorted({key for row in rows for key in row})) or "none"
        wanted = repr(column) if column else " or ".join(map(repr, CAPTION_NAMES))
        raise ValueError(f"no line of {path} has the key {wanted} (keys: {keys}); set data.caption_column.")
    return [as_captions(row[name]) if name else () for row, name in zip(rows, names, strict=True)]
