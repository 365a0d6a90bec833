"""What a training writes to go on from. Checkpoints are whole or not there, rotated, exact, and unable to run code.

Weights, averages and trajectories are safetensors; how far the training is, and each process' position in the data,
are JSON. accelerate saves optimizer, schedule, gradient scaler and random states, and reads them as tensors and plain
values alone (`weights_only=True`). FSDP and DeepSpeed have formats of their own, which can run code as pickles can.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings

import torch
from accelerate.utils import load as load_plain
from accelerate.utils.constants import RNG_STATE_NAME, SCALER_NAME
from pydantic import BaseModel, NonNegativeInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..atomic_files import atomic_path
from .config import DistillConfig

if TYPE_CHECKING:
    from .loop import Session

CHECKPOINTS, SHEETS = "checkpoints", "validation"
METRICS, READINGS, REPORT = "metrics.jsonl", "validation.jsonl", "report.md"
STUDENT, SCHEDULER, WORKFLOW = "student", "scheduler", "workflow"
DELTA, LORA = "delta.safetensors", "lora.safetensors"
LORA_KOHYA, LORA_RESIDUAL = "lora_kohya.safetensors", "lora_residual.safetensors"
RESULTS = (STUDENT, DELTA, SCHEDULER, LORA, LORA_KOHYA, LORA_RESIDUAL, WORKFLOW, REPORT)
"""What a finished training has in its directory; not every one has all."""
_STATE, _STUDENT, _AVERAGES = "state.json", "student.safetensors", "averages.safetensors"
_MAY_CHANGE = tuple(
    """output. loss. data.num_workers teacher.guidance_scale teacher.dtype teacher.offload teacher.on_policy_
    teacher.text_cache optimizer.learning_rate optimizer.schedule optimizer.warmup_steps
    optimizer.max_grad_norm optimizer.max_steps optimizer.gradient_checkpointing optimizer.compile""".split()
)
"""Settings that may differ from those of the run that is resumed."""


def sheet_path(directory: Path, step: int) -> Path:
    """The validation sheet of a step in an output directory."""
    return directory / SHEETS / f"step_{step:08d}.png"


def by_step(directory: Path, suffix: str = "") -> list[tuple[int, Path]]:
    """The steps and paths in a directory of checkpoints or of sheets (suffix ".png"), in order of the steps."""
    found = [(re.fullmatch(r"step_(\d{8,})", path.stem), path) for path in directory.glob(f"step_*{suffix}")]
    return sorted((int(match[1]), path) for match, path in found if match and path.suffix == suffix)


def append_line(path: Path, reading: Mapping[str, Any]) -> None:
    """Adds a reading, which has a `step`, to a file of JSON lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(reading) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The readings in a file; none where there is no file. Raises ValueError if it is damaged."""
    data = path.read_bytes() if path.exists() else b""
    try:  # without half a line, which a run that was killed may have left
        lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].decode().splitlines()]
        if all(type(line["step"]) is int for line in lines):
            return lines
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged; move it away, which loses its curves alone.")


def trim(directory: Path, step: int) -> None:
    """Removes readings and sheets of later steps than `step`, from where a run goes on; all readings at 0."""
    for path in (directory / METRICS, directory / READINGS):
        if lines := read_lines(path):
            with atomic_path(path) as temporary:
                kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= step and step]
                temporary.write_text("".join(kept), encoding="utf-8")
    for number, sheet in by_step(directory / SHEETS, ".png"):
        if number > step:
            sheet.unlink()


class State(BaseModel):
    """How far a training is."""

    step: NonNegativeInt
    average_steps: NonNegativeInt  # updates of the averages
    num_processes: NonNegativeInt
    config: dict[str, Any]  # settings by "section.field"


class Checkpoints:
    """The checkpoints in the session's output directory, which all processes see."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._last = 0  # step of this run's newest checkpoint
        self._index = session.accelerator.process_index
        session.accelerator.register_save_state_pre_hook(self._save_student)
        session.accelerator.register_load_state_pre_hook(self._load_student)

    def save(self, step: int) -> None:
        """Writes a checkpoint, which gets its name when it is complete. Every process calls it.

        With the first one, a run that was resumed from an earlier step replaces the later checkpoints it found.
        """
        session, accelerator, output = self._session, self._session.accelerator, self._session.config.output
        final = Path(output.directory) / CHECKPOINTS / f"step_{step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        if accelerator.is_main_process:
            for leftover in final.parent.glob(".step_*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        position = json.dumps(session.data.state_dict())
        (temporary / f"data_{self._index}.json").write_text(position, encoding="utf-8")
        session.pairs.save(temporary / f"trajectories_{self._index}.safetensors")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write(temporary / _AVERAGES, self._averages())
            averaged, settings = session.ema.optimization_step if session.ema else 0, session.config.flat()
            state = State(step=step, average_steps=averaged, num_processes=accelerator.num_processes, config=settings)
            (temporary / _STATE).write_text(state.model_dump_json(indent=2), encoding="utf-8")
            for number, path in by_step(final.parent):
                if number > self._last:  # not this run's
                    _remove(path)
            temporary.rename(final)
            for old in list_checkpoints(Path(output.directory))[: -output.keep_checkpoints]:
                _remove(old)
        self._last = step
        accelerator.wait_for_everyone()

    def load(self, path: Path) -> int:
        """Takes up a checkpoint in every process; returns its number of updates.

        Raises ValueError where it is damaged, of another number of processes, or fp16 and this run is not, or reverse.
        """
        state, accelerator = read_state(path), self._session.accelerator
        scaled, processes = (path / SCALER_NAME).is_file(), accelerator.num_processes
        if (state.num_processes, scaled) != (processes, accelerator.scaler is not None):
            raise ValueError(
                f"{path} is of {state.num_processes} processes {'with' if scaled else 'without'} fp16, and this run "
                f"has {processes} with precision {accelerator.mixed_precision}; launch it as before."
            )
        try:
            with catch_warnings(action="ignore", category=UserWarning):  # of torch, about pickles that it refuses
                self._restore(path, state)
        except Exception as error:  # a damaged file can lead to any
            raise _damaged(path, error) from error
        self._last = state.step
        return state.step

    def _restore(self, path: Path, state: State) -> None:
        session, states = self._session, load_plain(path / f"{RNG_STATE_NAME}_{self._index}.pkl")
        session.accelerator.load_state(str(path))
        # accelerate goes on without random states that it cannot take up.
        taken = torch.equal(torch.get_rng_state(), states["torch_manual_seed"])
        if not taken or random.getstate() != states["random_state"]:
            raise ValueError(f"{RNG_STATE_NAME}_{self._index}.pkl holds no random states")
        _take_up(path / _AVERAGES, self._averages())
        if session.ema is not None:
            session.ema.optimization_step = state.average_steps
        session.data.load_state_dict(json.loads((path / f"data_{self._index}.json").read_text(encoding="utf-8")))
        session.pairs.load(path / f"trajectories_{self._index}.safetensors")

    def _averages(self) -> dict[str, Tensor]:
        ema = self._session.ema
        return {} if ema is None else dict(zip(self._session.trained, ema.shadow_params, strict=True))

    def _save_student(self, models: list[Any], weights: list[dict[str, Any]], directory: str) -> None:
        """Saves the trained weights in place of all, where accelerate has them: not under FSDP and DeepSpeed."""
        if weights and self._session.accelerator.is_main_process:
            _write(Path(directory) / _STUDENT, self._session.trained)
        weights.clear()

    def _load_student(self, models: list[Any], directory: str) -> None:
        if models:
            _take_up(Path(directory) / _STUDENT, self._session.trained)
        models.clear()


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in an output directory, oldest first."""
    return [path for _, path in by_step(output / CHECKPOINTS)]


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint that the configuration asks to go on from; None for the beginning.

    Raises ValueError where it is not there, is damaged, is of more steps than are wanted, or was made with settings
    that cannot change; or where there are checkpoints and none of them is asked for.
    """
    resume, output = config.output.resume, Path(config.output.directory)
    present = list_checkpoints(output)
    latest = present[-1] if present else None
    path = latest if resume == "latest" else Path(resume) if resume else None
    if path is not None and not (path / _STATE).is_file():
        raise ValueError(f"output.resume: {path} is not a checkpoint, as it has no {_STATE}; pass another one.")
    if latest and (path is None or path.resolve().parent != latest.parent.resolve()):
        raise ValueError(
            f"output.directory={output} holds checkpoints up to {latest.name}; pass output.resume=latest to go on "
            "from there, or another directory."
        )
    if path is None:
        return None
    state = read_state(path)
    require_same(state.config, config.flat(), path)
    if state.step > config.optimizer.max_steps:
        raise ValueError(
            f"optimizer.max_steps={config.optimizer.max_steps} is below the {state.step} updates of {path.name}; "
            "pass at least as many, or go on from an earlier checkpoint."
        )
    return path


def read_state(path: Path) -> State:
    """How far a checkpoint is. Raises ValueError if it is damaged."""
    try:
        return State.model_validate_json((path / _STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(path / _STATE, error) from error


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError that names all settings by "section.field" that differ where they may not."""
    changed = [
        f"{key} is {json.dumps(value)} there and {json.dumps(new[key])} here"
        for key, value in {"teacher.order": 1, **old}.items()  # what it was before there was a choice
        if key in new and new[key] != value and not _may_change(key, value, new)
    ]
    if changed:
        raise ValueError(
            f"{path.name} cannot be resumed: {'; '.join(changed)}; set these back, or take another output.directory."
        )


def _may_change(key: str, old: Any, new: Mapping[str, Any]) -> bool:
    if key == "optimizer.mixed_precision":  # fp16 has a gradient scaler with a state of its own
        return "fp16" not in (old, new.get(key))
    # The rank of a full student is that of the LoRA which it is written as in the end.
    return key.startswith(_MAY_CHANGE) or (new["model.student"] == "full" and key == "model.lora_rank")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)


def _take_up(path: Path, into: Mapping[str, Tensor]) -> None:
    found = load_file(path)
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in into.items()}:
        raise ValueError(f"{path.name} holds other weights")
    with torch.no_grad():
        for name, value in into.items():
            value.copy_(found[name])


def _remove(path: Path) -> None:
    """Deletes a checkpoint, which first loses its name: a run that is killed leaves none in halves."""
    gone = path.with_name(f".{path.name}.old")
    path.rename(gone)
    shutil.rmtree(gone)


def _damaged(path: Path, error: Exception) -> ValueError:
    plain = {UnpicklingError: "one file is not plain tensors", ValidationError: "damaged, or of another version"}
    reason = plain.get(type(error)) or f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
    return ValueError(f"{path} cannot be resumed ({reason}); fix that, or pass another one, or another directory.")
