"""Where a training puts what it writes: names in its output directory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CHECKPOINTS, SHEETS, PLOTS = "checkpoints", "validation", "plots"
STUDENT, SCHEDULER, WORKFLOW = "student", "scheduler", "workflow"
DELTA, LORA = "delta.safetensors", "lora.safetensors"
LORA_KOHYA, LORA_RESIDUAL = "lora_kohya.safetensors", "lora_residual.safetensors"
METRICS, READINGS, REPORT = "metrics.jsonl", "validation.jsonl", "report.md"
_DIRECTORIES = (CHECKPOINTS, SHEETS, PLOTS, STUDENT, SCHEDULER)
_FILES = (DELTA, LORA, LORA_KOHYA, LORA_RESIDUAL, METRICS, READINGS, REPORT)
_STEP = re.compile(r"step_(\d{8,})")


def checkpoint_path(directory: Path, step: int) -> Path:
    """The checkpoint of a step in an output directory."""
    return directory / CHECKPOINTS / f"step_{step:08d}"


def sheet_path(directory: Path, step: int) -> Path:
    """The validation sheet of a step in an output directory."""
    return directory / SHEETS / f"step_{step:08d}.png"


def by_step(directory: Path, suffix: str = "") -> Iterator[tuple[int, Path]]:
    """The steps and paths in a directory of checkpoints or of sheets (suffix ".png"), in order of the steps."""
    if not directory.is_dir():
        return
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.stem))]
    yield from sorted(entry for entry in found if entry[1].suffix == suffix)


def in_the_way(directory: Path) -> Iterator[str]:
    """A sentence for each file where a directory will be written, and the other way round; not for the workflow."""
    for name, is_file in (*((name, False) for name in _DIRECTORIES), *((name, True) for name in _FILES)):
        path = directory / name
        if path.exists() and path.is_file() != is_file:
            there, wanted = ("directory", "file") if is_file else ("file", "directory")
            yield f"{path} is a {there} where a {wanted} is written; move it away, or name another output.directory."
