"""Checkpoints of a training: complete or not there, rotated, and exact to go on from.

accelerate saves model, optimizer, schedule, gradient scaler, averaged weights and every process' random state; beside
them stand each process' position in the data and what its pairs are drawn from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.constants import SCALER_NAME
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from .config import DistillConfig
from .data import BatchSource
from .layout import CHECKPOINTS, SHEETS, by_step, checkpoint_path
from .progress import WindowLosses
from .starts import PairSource

logger = logging.get_logger(__name__)

_STATE = "state.json"
_ADAPTER = "adapter.safetensors"
_MAY_CHANGE = (
    "output.",
    "loss.",
    "data.num_workers",
    "teacher.guidance_scale",
    "teacher.dtype",
    "teacher.offload",
    "teacher.on_policy_",
    "teacher.text_cache",
    "teacher.latent_cache",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.max_grad_norm",
    "optimizer.max_steps",
    "optimizer.gradient_checkpointing",
    "optimizer.compile",
)
"""Settings that a run may have otherwise than the one it goes on from."""
_OTHER_LOSSES = ("loss.", "teacher.guidance_scale", "teacher.dtype", "teacher.on_policy_", "optimizer.mixed_precision")
"""Those of them that make losses others than they were, which says nothing of the training."""
_PRECISION = "optimizer.mixed_precision"
"""May change too, except to or from fp16, which has a gradient scaler with a state of its own."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a training got: updates, micro-steps of each process, and what the divergence guard goes by."""

    step: int = 0
    micro_step: int = 0
    losses: tuple[WindowLosses, ...] = ()


class Checkpoints:
    """The checkpoints in an output directory, which all processes see.

    Args:
        accelerator: knows what there is to save; what is prepared and registered with it by then.
        config: of this run; the checkpoint keeps it.
        data: this process' batches.
        pairs: this process' pairs.
    """

    def __init__(self, accelerator: Any, config: DistillConfig, data: BatchSource, pairs: PairSource) -> None:
        self._accelerator = accelerator
        self._config = config
        self._data = data
        self._pairs = pairs
        self._output = Path(config.output.directory)
        self.directory = self._output / CHECKPOINTS
        self._abandoned = self._later(0)

    def save(self, position: Position) -> Path:
        """Writes a checkpoint, which gets its name when it is complete. Every process calls it.

        With the first one a run that went on from an earlier step takes the place of the one that had gone further.
        """
        accelerator = self._accelerator
        final = checkpoint_path(self._output, position.step)
        temporary = self.directory / f".{final.name}.tmp"
        if accelerator.is_main_process:
            for leftover in self.directory.glob(".*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        self._pairs.save(temporary)
        own = {"micro_step": position.micro_step, "data": self._data.state_dict()}
        (temporary / _process_file(accelerator.process_index)).write_text(json.dumps(own))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {
                "step": position.step,
                "window_losses": position.losses,
                "num_processes": accelerator.num_processes,
                "config": self._config.flat(),
            }
            (temporary / _STATE).write_text(json.dumps(state, indent=2))
            self._drop_abandoned()
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            others = [path for path in list_checkpoints(self.directory) if path != final]
            for old in others[: max(0, len(others) + 1 - self._config.output.keep_checkpoints)]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return final

    def _later(self, step: int) -> dict[Path, int]:
        """Checkpoints and sheets there are of steps that this run has yet to do, and when they were written."""
        there = [*by_step(self.directory), *by_step(self._output / SHEETS, ".png")]
        return {path: path.stat().st_mtime_ns for number, path in there if number > step}

    def _drop_abandoned(self) -> None:
        """Drops what a run that had gone further left: its checkpoints would count as the newest ones otherwise."""
        # A sheet written since is this run's own; checkpoints it has none yet.
        gone = [
            path
            for path, written in self._abandoned.items()
            if path.is_dir() or (path.exists() and path.stat().st_mtime_ns == written)
        ]
        if gone:
            logger.warning("what a run left that had gone further is dropped: %s.", ", ".join(map(str, gone)))
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._abandoned = {}

    def load(self, path: Path) -> Position:
        """Takes up a checkpoint in every process.

        Raises:
            ValueError: it is of another number of processes, or of a training with a gradient scaler and this one has
                none, or the other way round.
        """
        state = read_state(path)
        accelerator = self._accelerator
        if state["num_processes"] != accelerator.num_processes:
            raise ValueError(
                f"{path} is of {state['num_processes']} processes and this run has {accelerator.num_processes}; "
                "launch as many, or start anew in another output.directory."
            )
        scaled = (path / SCALER_NAME).is_file()
        if scaled != (accelerator.scaler is not None):
            raise ValueError(
                f"{path} was written {'with' if scaled else 'without'} mixed precision fp16 and this run has "
                f"{accelerator.mixed_precision}; launch it as before, or start anew in another output.directory."
            )
        accelerator.load_state(str(path))
        own = json.loads((path / _process_file(accelerator.process_index)).read_text())
        self._data.load_state_dict(own["data"])
        self._pairs.load(path)
        self._abandoned = self._later(state["step"])
        losses: tuple[WindowLosses, ...] = ()
        if not any(key.startswith(_OTHER_LOSSES) for key, *_ in differences(state["config"], self._config.flat())):
            losses = tuple(map(tuple, state.get("window_losses", ())))
        return Position(step=state["step"], micro_step=own["micro_step"], losses=losses)


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    return [path for _, path in by_step(directory) if (path / _STATE).is_file()]


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint that the configuration asks to go on from; None for the beginning.

    Raises:
        ValueError: it is not there, is of more steps than are wanted, or was made with settings that cannot change; or
            none of those in the output directory is asked for, which a new run would replace.
    """
    resume, directory = config.output.resume, Path(config.output.directory) / CHECKPOINTS
    present = list_checkpoints(directory)
    match resume:
        case None if present:
            raise ValueError(
                f"output.directory={config.output.directory} holds checkpoints up to {present[-1].name}; pass "
                "output.resume=latest to go on from there, or another directory."
            )
        case None:
            return None
        case "latest":
            path = present[-1] if present else None
        case _:
            path = Path(resume)
            if not (path / _STATE).is_file():
                raise ValueError(f"output.resume={resume} is no checkpoint; pass the folder of one, or latest.")
            if present and path.resolve().parent != directory.resolve():
                raise ValueError(
                    f"output.directory={config.output.directory} holds other checkpoints than output.resume={resume}, "
                    f"up to {present[-1].name}; pass output.resume=latest to go on from there, or another directory."
                )
    if path is not None:
        state = read_state(path)
        require_same(state["config"], config.flat(), path)
        if state["step"] > config.optimizer.max_steps:
            raise ValueError(
                f"optimizer.max_steps={config.optimizer.max_steps} is below the {state['step']} updates of "
                f"{path.name}; pass at least as many, or go on from an earlier checkpoint."
            )
    return path


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: configurations, as of `flat`, that differ in a setting that has to stay; all of these are named.
    """
    full = new["model.student"] == "full"
    changed = [
        f"{key} is {json.dumps(there)} there and {json.dumps(here)} here"
        for key, there, here in differences(old, new)
        if not _may_change(key, there, here, full)
    ]
    if changed:
        raise ValueError(
            f"{path.name} cannot be gone on from: {'; '.join(changed)}; set these back, or take another "
            "output.directory."
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings of `old`, by "section.name", that `new` has otherwise: both values."""
    for key, value in old.items():
        if new.get(key) != value:
            yield key, value, new.get(key)


def _may_change(key: str, old: Any, new: Any, full: bool) -> bool:
    if key == _PRECISION:
        return "fp16" not in (old, new)
    # The rank of a full student is that of the LoRA which it is written as in the end.
    return key.startswith(_MAY_CHANGE) or (full and key == "model.lora_rank")


def save_adapters_alone(accelerator: Any) -> None:
    """Has the checkpoints of a LoRA student hold its factors and not the frozen weights, where no shards are saved."""

    def save(models: list[Any], weights: list[dict[str, Any]], directory: str) -> None:
        if weights:
            state = weights.pop()
            factors = {name: tensor.contiguous() for name, tensor in state.items() if ".lora_" in name}
            if accelerator.is_main_process:
                save_file(factors, Path(directory) / _ADAPTER)

    def load(models: list[Any], directory: str) -> None:
        if models:
            models.pop().load_state_dict(load_file(Path(directory) / _ADAPTER), strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _process_file(index: int) -> str:
    return f"process_{index}.json"
