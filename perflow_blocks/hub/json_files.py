"""The JSON files of a workflow repository: their names, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "modular_model_index.json"
BLOCKS_CONFIG = "modular_config.json"
MELLON = "mellon_pipeline_config.json"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(to_json(values), encoding="utf-8", newline="\n")


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def parse_json(text: bytes, name: str) -> dict[str, Any]:
    """The object that the text of a file is; `name` stands in the error.

    Raises:
        ValueError: it is none.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read ({error}); download or export the workflow again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} holds no JSON object; download or export the workflow again.")
    return values
