"""The trainer at SDXL's size with random weights, for a few updates."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

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
from perflow_blocks.training.loop import Observer, Session, train

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
    """Times the updates after the first ones, in turns with their networks' calls alone, and ends the training.

    Args:
        updates: that are measured.
    """

    def __init__(self, updates: int) -> None:
        self.seconds: list[float] = []
        self.bare: list[float] = []
        self.peak = 0
        self._updates = updates
        self._since = 0.0
        self._calls: list[tuple[bool, Any, tuple[Any, ...], dict[str, Any]]] = []

    def started(self, session: Session, step: int) -> None:
        networks = {session.accelerator.unwrap_model(session.student), session.teacher.unet}  # may be one
        self._hooks = [unet.register_forward_pre_hook(self._note, with_kwargs=True) for unet in networks]

    def _note(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((torch.is_grad_enabled(), unet, args, kwargs))

    def updated(self, session: Session, step: int) -> None:
        device = session.accelerator.device
        now = _synchronized(device)
        for hook in self._hooks if step == 1 else ():
            hook.remove()
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if step > WARM_UP:
            self.seconds.append(now - self._since)
            self.bare.append(self._call_alone(session))
        if len(self.seconds) == self._updates:
            if device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated(device)
            raise Enough
        self._since = _synchronized(device)

    def _call_alone(self, session: Session) -> float:
        """Seconds of the calls of the first update: the teacher's forward, the student's forward and backward."""
        began = _synchronized(session.accelerator.device)
        with torch.no_grad(), session.teacher.at_hand():
            for trained, unet, args, kwargs in self._calls:
                if not trained:
                    unet(*args, **kwargs)
        for trained, unet, args, kwargs in self._calls:
            if trained:
                unet(*args, **kwargs)[0].square().mean().backward()
        seconds = _synchronized(session.accelerator.device) - began
        session.optimizer.zero_grad()
        return seconds


def _synchronized(device: torch.device) -> float:
    """The time when all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    return [*plain, *(case for case in saving if case.optimizer == "adamw" or find_spec("bitsandbytes"))]


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


def measure(case: Case, size: Size, directory: Path, updates: int) -> tuple[Timing, Timing, int]:
    """Seconds of the updates, of their networks' calls alone, and on CUDA the most bytes allocated, elsewhere 0.

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
    return Timing(tuple(watch.seconds)), Timing(tuple(watch.bare)), watch.peak


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
