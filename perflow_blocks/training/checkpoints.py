"""Checkpoints of a training: complete or not there, rotated, and exact to go on from.

accelerate saves model, optimizer, schedule, gradient scaler, averaged weights and every process' random state; beside
them stand each process' position in the data and what its pairs are drawn from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils.constants import SCALER_NAME
from safetensors.torch import load_file, save_file

from .config import DistillConfig
from .config_file import to_tree
from .data.batch import BatchSource
from .starts import PairSource

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{8,})")
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
    "optimizer.max_grad_norm",
    "optimizer.max_steps",
    "optimizer.gradient_checkpointing",
    "optimizer.compile",
)
"""Settings that a run may have otherwise than the one it goes on from."""
_PRECISION = "optimizer.mixed_precision"
"""May change too, except to or from fp16, which has a gradient scaler with a state of its own."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a training got: updates, micro-steps of each process, and what the divergence guard goes by."""

    step: int = 0
    micro_step: int = 0
    losses: tuple[float, ...] = ()


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
        self.directory = Path(config.output.directory) / FOLDER

    def save(self, position: Position) -> Path:
        """Writes a checkpoint, which gets its name when it is complete. Every process calls it."""
        accelerator = self._accelerator
        final = self.directory / f"step_{position.step:08d}"
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
                "losses": position.losses,
                "num_processes": accelerator.num_processes,
                "config": to_tree(self._config),
            }
            (temporary / _STATE).write_text(json.dumps(state, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            for old in list_checkpoints(self.directory)[: -self._config.output.keep_checkpoints]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return final

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
        return Position(step=state["step"], micro_step=own["micro_step"], losses=tuple(state["losses"]))


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory, oldest first."""
    found = {int(match[1]): path for path in directory.glob("step_*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found) if (found[step] / _STATE).is_file()]


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint that the configuration asks to go on from; None for the beginning.

    Raises:
        ValueError: it is not there, or was made with settings that cannot change; or none is asked for and there are
            some, which a new run would replace.
    """
    resume, directory = config.output.resume, Path(config.output.directory) / FOLDER
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
    if path is not None:
        require_same(read_state(path)["config"], to_tree(config), path)
    return path


def read_state(path: Path) -> dict[str, Any]:
    return json.loads((path / _STATE).read_text(encoding="utf-8"))


def require_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: configurations, as of `to_tree`, that differ in a setting that has to stay; all of these are named.
    """
    here = dict(_flat(new))
    changed = [
        f"{key} is {json.dumps(value)} there and {json.dumps(here.get(key))} here"
        for key, value in _flat(old)
        if here.get(key) != value and not _may_change(key, value, here.get(key))
    ]
    if changed:
        raise ValueError(
            f"{path.name} cannot be gone on from: {'; '.join(changed)}; set these back, or take another "
            "output.directory."
        )


def _may_change(key: str, old: Any, new: Any) -> bool:
    return key.startswith(_MAY_CHANGE) or (key == _PRECISION and "fp16" not in (old, new))


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


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, values in tree.items():
        for name, value in values.items():
            yield f"{section}.{name}", value
