"""The JSON files of a workflow repository: their names, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "modular_model_index.json"
BLOCKS_CONFIG = "modular_config.json"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(to_json(values), encoding="utf-8")


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
