"""The trainer at SDXL's size with random weights, for a few updates."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image

from perflow_blocks.demo.models import SCHEDULE
from perflow_blocks.training.config import (
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TeacherConfig,
)
from perflow_blocks.training.loop import Observer, train
from perflow_blocks.training.optimizers import optimizer_problem
from perflow_blocks.training.session import Session

from .measure import Timing
from .models import Size, build_components

RANK, STEPS, IMAGES = 64, 10, 4
UPDATES, WARM_UP = 7, 3
TEACHER, DATA, OUTPUT = "teacher", "images", "output"

Kind = Literal["lora", "full"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way of training.

    Attributes:
        student: as `model.student`.
        checkpointing: as `optimizer.gradient_checkpointing`.
        guidance: as `teacher.cfg_mode`.
        optimizer: as `optimizer.name`.
        offload: as `teacher.offload`.
        steps: of the teacher in a window.
    """

    student: Kind
    checkpointing: bool
    guidance: Literal["fixed", "sync"] = "fixed"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Literal["none", "encoders", "all"] = "none"
    steps: int = STEPS


class Enough(BaseException):
    """All updates were measured. No failure, before which the trainer would save what it has."""


class Watch(Observer):
    """Times the updates after the first ones, sees how much memory they take, and ends the training.

    Args:
        updates: that are measured.
    """

    def __init__(self, updates: int) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._updates = updates
        self._since = 0.0

    def updated(self, session: Session, step: int) -> None:
        device = session.accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if step > WARM_UP:
            self.seconds.append(now - self._since)
        if len(self.seconds) == self._updates:
            if device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(device)
            raise Enough
        self._since = time.perf_counter()


def students() -> Iterator[tuple[Kind, bool]]:
    """The kinds, each with and without gradient checkpointing."""
    kinds: tuple[Kind, ...] = ("lora", "full")
    return itertools.product(kinds, (True, False))


def make_cases() -> list[Case]:
    """Every student with and without guidance, then what saves more memory, as far as it is installed."""
    plain = [
        Case(student=kind, checkpointing=checkpointing, guidance=guidance)
        for kind, checkpointing in students()
        for guidance in ("fixed", "sync")
    ]
    saving = [
        Case(student="lora", checkpointing=True, offload="encoders"),
        Case(student="full", checkpointing=True, offload="all"),
        Case(student="lora", checkpointing=True, optimizer="adamw8bit", offload="encoders"),
        Case(student="full", checkpointing=True, optimizer="adamw8bit", offload="all"),
    ]
    return [*plain, *(case for case in saving if optimizer_problem(OptimizerConfig(name=case.optimizer)) is None)]


@contextmanager
def teacher_directory(size: Size, device: torch.device) -> Iterator[Path]:
    """A temporary directory with a teacher of random weights in bfloat16, and images with captions."""
    with tempfile.TemporaryDirectory(prefix="training-") as name:
        directory = Path(name)
        _save_teacher(size, device, directory / TEACHER)
        _save_images(size, directory / DATA)
        _release()
        yield directory


def _save_teacher(size: Size, device: torch.device, directory: Path) -> None:
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    components = build_components(size, device, torch.bfloat16)
    StableDiffusionXLPipeline(**components, scheduler=scheduler).save_pretrained(directory)


def _save_images(size: Size, directory: Path) -> None:
    directory.mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (size.pixels, size.pixels, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text("a red star on a white background", encoding="utf-8")


def _release() -> None:
    """Gives memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(case: Case, size: Size, directory: Path, updates: int) -> tuple[Timing, int]:
    """Seconds of the updates, and on CUDA the most bytes that were allocated during them, elsewhere 0.

    Args:
        case: how to train.
        size: of the models in the directory.
        directory: as `teacher_directory` gives it.
        updates: at least 2, after the untimed ones.
    """
    watch = Watch(updates)
    try:
        train(make_config(case, size, directory, WARM_UP + updates + 1), [watch])
    except Enough:
        pass
    finally:
        _release()
    return Timing(tuple(watch.seconds)), watch.peak


def make_config(case: Case, size: Size, directory: Path, max_steps: int) -> DistillConfig:
    """The trainer's settings; nothing is saved or validated on the way."""
    return DistillConfig(
        model=ModelConfig(teacher=str(directory / TEACHER), student=case.student, lora_rank=RANK),
        data=DataConfig(kind="folder", path=str(directory / DATA), resolution=size.pixels, bucketing=False),
        teacher=TeacherConfig(
            steps_per_window=case.steps, cfg_mode=case.guidance, dtype="bfloat16", offload=case.offload
        ),
        optimizer=OptimizerConfig(
            name=case.optimizer,
            gradient_checkpointing=case.checkpointing,
            mixed_precision="bf16",
            max_steps=max_steps,
            warmup_steps=0,
        ),
        output=OutputConfig(
            directory=str(directory / OUTPUT), checkpoint_every=max_steps + 1, log_every=max_steps + 1, workflow=False
        ),
    )
