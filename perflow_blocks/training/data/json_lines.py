"""JSON Lines files with captions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CAPTION_NAMES


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, one a line; empty lines are passed over.

    Raises:
        ValueError: a line is no JSON object, or the file is not UTF-8.
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error.msg}); write one object a line.") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is no JSON object; write one object a line.")
        rows.append(row)
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with or without a byte order mark.

    Lines end at \\n or \\r\\n alone: captions may hold what Unicode has for the purpose besides.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check the path and its permissions.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    return text.replace("\r\n", "\n").split("\n")


def caption_name(names: Mapping[str, Any] | list[str], wanted: str | None) -> str | None:
    """The name of the captions among `names`: the wanted one, or else the first usual one; None if it is not there."""
    return next((name for name in ((wanted,) if wanted else CAPTION_NAMES) if name in names), None)
