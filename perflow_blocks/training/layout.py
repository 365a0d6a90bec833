"""Where a training puts what it writes: names in its output directory, and its files of readings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..atomic_files import atomic_path

CHECKPOINTS, SHEETS, PLOTS = "checkpoints", "validation", "plots"
STUDENT, SCHEDULER, WORKFLOW = "student", "scheduler", "workflow"
DELTA, LORA = "delta.safetensors", "lora.safetensors"
LORA_KOHYA, LORA_RESIDUAL = "lora_kohya.safetensors", "lora_residual.safetensors"
METRICS, READINGS, REPORT = "metrics.jsonl", "validation.jsonl", "report.md"
RESULTS = {
    STUDENT: "student, a UNet",
    DELTA: "delta (student less teacher, with the recipe)",
    SCHEDULER: "scheduler",
    LORA: "LoRA",
    LORA_KOHYA: "LoRA in kohya's keys",
    LORA_RESIDUAL: "residual, to be merged beside the LoRA",
    WORKFLOW: "workflow repository, for `perflow push`",
    REPORT: "this report",
}
"""What a finished training has in its directory; not every one has all."""
_STEP = re.compile(r"step_(\d{8,})")


def checkpoint_path(directory: Path, step: int) -> Path:
    """The checkpoint of a step in an output directory."""
    return directory / CHECKPOINTS / f"step_{step:08d}"


def sheet_path(directory: Path, step: int) -> Path:
    """The validation sheet of a step in an output directory."""
    return directory / SHEETS / f"step_{step:08d}.png"


def by_step(directory: Path, suffix: str = "") -> Iterator[tuple[int, Path]]:
    """The steps and paths in a directory of checkpoints or of sheets (suffix ".png"), in order of the steps."""
    if directory.is_dir():
        found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.stem))]
        yield from sorted(entry for entry in found if entry[1].suffix == suffix)


def append_line(path: Path, reading: Mapping[str, Any]) -> None:
    """Adds a reading, which has a `step`, to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(reading) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The readings in a file; none where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]  # a run that was killed may have left half a line
    try:
        lines = [json.loads(line) for line in complete.decode().splitlines()]
        if all(type(line["step"]) is int for line in lines):
            return lines
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged; move it away, which loses its curves alone.")


def trim(directory: Path, step: int) -> None:
    """Removes readings and sheets of later steps, which a run left that is now gone on with from `step`."""
    for path in (directory / METRICS, directory / READINGS):
        if lines := read_lines(path):
            with atomic_path(path) as temporary:
                kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step]
                temporary.write_text("".join(kept), encoding="utf-8")
    for number, sheet in by_step(directory / SHEETS, ".png"):
        if number > step:
            sheet.unlink()
