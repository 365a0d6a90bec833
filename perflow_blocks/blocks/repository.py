"""What the JSON files of a pipeline's directory name, checked before it is used: they may come from a stranger."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..delta.files import leads_out, read_json, shard_names
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS

BLOCKS_CONFIG, INDEX, CLASSIC_INDEX = "modular_config.json", "modular_model_index.json", "model_index.json"
LOCATION = "pretrained_model_name_or_path"
_CLASS = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)")
_MAY_BE_ABSOLUTE = (LOCATION, "delta")


def require_sound(directory: Path, *, portable: bool = False) -> None:
    """Checks that index, shards' indices and the scheduler's configuration can be used and stay in the directory.

    Args:
        directory: of a pipeline or a workflow. It needs no index.
        portable: whether an index may not name places of this machine either, as `save_pretrained` does.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    file = next((directory / name for name in (INDEX, CLASSIC_INDEX) if (directory / name).is_file()), None)
    index = {} if file is None else read_json(file)
    folders = {""}
    for name, key, path in index_paths(index):
        if not isinstance(path, str) or leads_out(path):
            if portable or key not in _MAY_BE_ABSOLUTE or not os.path.isabs(str(path)):
                raise ValueError(f"{file} names {path!r} as the {key} of {name}; it must be a path in the repository.")
        elif key == "subfolder":
            folders.add(path)
    for folder in folders:
        for shards in (directory / folder).glob("*.index*.json"):
            shard_names(shards)
    scheduler = directory / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and read_json(scheduler).keys().isdisjoint(NOISE_SCHEDULE_KEYS):
        raise ValueError(f"{scheduler} is not a scheduler's: it has none of {', '.join(NOISE_SCHEDULE_KEYS)}.")


def index_paths(index: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Every path that an index names, after the component's name and what the path is for."""
    for name, value in index.items():
        if is_entry(value):
            for key in (LOCATION, "subfolder", "variant"):
                if value[2].get(key) is not None:
                    yield name, key, value[2][key]
        elif isinstance(value, list) and len(value) == 2:  # of a classic pipeline, in a folder of its own
            yield name, "subfolder", name
        elif name == "delta" and value is not None:
            yield "the pipeline", name, value


def is_entry(value: Any) -> bool:
    """Whether a value of a modular index is a component's: its library, its class, and where it is loaded from."""
    return isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict)


def class_reference(config: Mapping[str, Any]) -> tuple[str, str]:
    """The file and the class of the blocks that a `modular_config.json` names.

    Raises:
        ValueError: it names none.
    """
    entry = config.get("auto_map")
    named = entry.get("ModularPipelineBlocks") if isinstance(entry, dict) else entry
    match = _CLASS.fullmatch(named) if isinstance(named, str) else None
    if match is None:
        raise ValueError(
            f'{BLOCKS_CONFIG} must name the blocks as "auto_map": {{"ModularPipelineBlocks": "block.MyBlocks"}}, '
            f"not {named!r}; export the workflow again."
        )
    return f"{match[1]}.py", match[2]


def workflow_config(directory: Path) -> tuple[dict[str, Any], str, str]:
    """The `modular_config.json` of a workflow, and the file and the class that it names.

    Raises:
        ValueError: it is missing or broken, or the file is missing.
    """
    if not (directory / BLOCKS_CONFIG).is_file():
        raise ValueError(
            f"{directory} is not a workflow: it has no {BLOCKS_CONFIG}; export_workflow writes workflows."
        )
    config = read_json(directory / BLOCKS_CONFIG)
    file, kind = class_reference(config)
    if not (directory / file).is_file():
        raise ValueError(f"{directory} has no {file}, which its {BLOCKS_CONFIG} names; export the workflow again.")
    return config, file, kind
