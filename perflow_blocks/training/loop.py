"""A training: everything that it works with, and the loop over its updates, on accelerate."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, cpu_offload_with_hook
from accelerate.utils import InitProcessGroupKwargs
from diffusers.utils import logging
from torch import Tensor

from .checkpoints import METRICS, Checkpoints, append_line, find_checkpoint, list_checkpoints, trim
from .config import DistillConfig
from .data import open_dataset
from .output import write_result
from .pairs import NoisedStarts, PairSource, TrajectoryStarts, distillation_step
from .student import build_student, make_ema, make_optimizer, make_schedule, set_learning_rate, trainable
from .teacher import (
    LatentEncoder,
    Offload,
    PromptEncoder,
    Teacher,
    WindowGeometry,
    open_teacher,
    then,
    without_factors,
)

logger = logging.get_logger(__name__)

TRACKER_NAME = "perflow_distill"
EXPLOSION = 30.0
"""The training ends where the last losses are this many times all earlier ones, in geometric means."""
_JUDGED = 20  # updates that are judged together: with a row or two in each, single ones jump by orders of magnitude
_PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which alone draws validation sheets and writes the result."""


class Session:
    """A distillation in this process, with nothing taken up from a checkpoint yet.

    Attributes:
        student: the UNet, prepared by the accelerator, as are `optimizer` and `schedule`.
        trained: the student's trainable parameters by their names in the bare UNet.
        ema: averages of `trained`, or None.
        data: batches of this process.
        pairs: what the student is trained on.

    Raises:
        ValueError: weights or data that cannot be read, or averages where each process holds a part of the weights.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.accelerator = accelerator = make_accelerator(config)
        if config.optimizer.ema_decay and self.is_sharded:
            raise ValueError(
                "optimizer.ema_decay needs all weights in every process, and here each has a part; pass 0."
            )
        self.source = open_teacher(config.model)
        self.geometry = WindowGeometry(config.windows, self.source.scheduler_config, accelerator.device)
        self.data = open_dataset(
            config.data,
            batch_size=config.optimizer.batch_size,
            seed=config.optimizer.seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        # A LoRA's frozen weights have the type in which they are multiplied anyway.
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self._base_dtype = half.get(accelerator.mixed_precision, torch.float32)
        student = build_student(self.source, config.model, config.optimizer, self._base_dtype)
        optimizer = make_optimizer(trainable(student).values(), config.optimizer)
        schedule = make_schedule(optimizer, config.optimizer)
        prepared: Any = accelerator.prepare(student, optimizer, schedule)
        self.student, self.optimizer, self.schedule = prepared
        self.trained = trainable(accelerator.unwrap_model(self.student))
        self.ema = make_ema(self.trained, config.optimizer.ema_decay)
        self.teacher = self._make_teacher()
        self.pairs = self._make_pairs()

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the student's weights only."""
        plugin = self.accelerator.state.deepspeed_plugin
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        return fsdp or (plugin is not None and plugin.zero_stage == 3)

    def _make_teacher(self) -> Teacher:
        config, device, dtype = self.config, self.accelerator.device, getattr(torch, self.config.teacher.dtype)
        text = self.source.load_text_pipeline(dtype)
        encoders = [getattr(text, name) for name in self.source.family.text_encoders]
        offload = _place(encoders, device, config.teacher.offload != "none")
        encoder = PromptEncoder(text, device, config.teacher.text_cache, offload)
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext
        # The frozen weights of a LoRA serve as the teacher's where they are whole and of its type. With compiled
        # blocks that would compile anew whenever the factors come and go.
        alike = config.model.student == "lora" and dtype == self._base_dtype and not self.is_sharded
        if alike and not config.optimizer.compile:
            unet = self.accelerator.unwrap_model(self.student)
            at_hand = partial(without_factors, unet)
        else:
            unet = self.source.load_unet(dtype).requires_grad_(False)
            if config.optimizer.channels_last:
                unet.to(memory_format=torch.channels_last)
            if config.optimizer.compile:
                unet.compile_repeated_blocks()
            if take_back := _place([unet], device, config.teacher.offload == "all"):
                at_hand = partial(then, take_back)
        return Teacher(unet, self.source.scheduler(), encoder, self.geometry, config.teacher, at_hand)

    def _make_pairs(self) -> PairSource:
        config, device = self.config, self.accelerator.device
        common: dict[str, Any] = {
            "teacher": self.teacher,
            "batches": (batch for batch in self.data),  # from the position that the data has at the first one
            "seed": config.optimizer.seed,
            "process_index": self.accelerator.process_index,
            "caption_dropout": config.loss.caption_dropout,
        }
        if config.teacher.starts == "trajectory":
            factor, rows = self.source.vae_factor, config.optimizer.batch_size
            return TrajectoryStarts(**common, vae_factor=factor, device=device, batch_size=rows)
        vae = self.source.load_vae(getattr(torch, config.teacher.dtype))
        offload = _place([vae], device, config.teacher.offload != "none")
        return NoisedStarts(**common, latents=LatentEncoder(vae, device, config.teacher.latent_cache, offload))


def make_accelerator(config: DistillConfig) -> Accelerator:
    """accelerate's own settings decide devices and processes, and the precision where the configuration does not."""
    accelerator = Accelerator(
        mixed_precision=config.optimizer.mixed_precision,
        gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
        log_with=config.output.tracker,
        project_dir=config.output.directory,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it reads this off a prepared data loader otherwise, which there is none of
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.optimizer.batch_size
    return accelerator


def _place(models: list[Any], device: torch.device, offload: bool) -> Offload | None:
    """Puts models on the device, or has them wait on the host; then returns what takes them back there."""
    if offload:
        hooks = [cpu_offload_with_hook(model, device)[1] for model in models]
        return lambda: [hook.offload() for hook in hooks]
    for model in models:
        model.to(device)
    return None


class DivergenceError(ValueError):
    """The training diverged; the message says where, what is kept, and what to change."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The updates since the last reading."""

    step: int
    max_steps: int
    losses: list[float]  # weighted loss of each update, over all processes
    window_losses: list[float | None]  # unweighted; None for a window that had no row
    gradient_norms: list[float]  # before clipping, of each update
    learning_rate: float
    samples_per_second: float  # rows of all processes
    eta_seconds: float

    @property
    def loss(self) -> float:
        """The mean of `losses`."""
        return sum(self.losses) / len(self.losses)

    def describe(self) -> str:
        """One line for a terminal."""
        windows = " ".join("-" if loss is None else f"{loss:.4g}" for loss in self.window_losses)
        eta = timedelta(seconds=round(self.eta_seconds))
        return (
            f"step {self.step}/{self.max_steps}  loss {self.loss:.4g}  windows {windows}  "
            f"lr {self.learning_rate:.3g}  {self.samples_per_second:.3g} samples/s  ETA {eta}"
        )

    def figures(self) -> dict[str, float]:
        """Numbers by name, for a tracker."""
        return {
            "loss": self.loss,
            **{f"loss/window_{i}": loss for i, loss in enumerate(self.window_losses) if loss is not None},
            "gradient_norm": self.gradient_norms[-1],
            "learning_rate": self.learning_rate,
            "samples_per_second": self.samples_per_second,
        }


class Observer:
    """Sees a training happen; every process calls it. What it does not override does nothing."""

    def started(self, session: Session, step: int) -> None:
        """Before the first update, of which `step` were done in an earlier run."""

    def updated(self, session: Session, step: int) -> None:
        """After each update; reading a tensor here makes the loop wait for the device."""

    def read(self, progress: Progress) -> None:
        """After the losses were read."""


def train(config: DistillConfig, observers: Sequence[Observer] = ()) -> None:
    """Distils a student as configured and writes the result; every process of the launch calls it.

    Raises:
        DivergenceError: the training diverged; the last checkpoint before is kept.
        ValueError: weights, data or a checkpoint that cannot be read.
    """
    checkpoint = find_checkpoint(config)
    session = Session(config)
    settings = {
        name: value if isinstance(value, (int, float)) else str(value) for name, value in config.flat().items()
    }
    session.accelerator.init_trackers(TRACKER_NAME, config=settings)
    try:
        run = TrainingRun(session, observers)
        run.start(checkpoint)
        run.finish()
        write_result(session)
    finally:
        session.accelerator.end_training()


class TrainingRun:
    """The updates of a session, with what is read and saved between them."""

    def __init__(self, session: Session, observers: Sequence[Observer] = ()) -> None:
        self.session = session
        self.observers = observers
        self.checkpoints = Checkpoints(session)
        self.guard = DivergenceGuard(session.config)
        self.parameters = list(session.student.parameters())  # a walk over all modules takes milliseconds
        self.step = 0
        self.rate = 0.0
        self._forget()

    def start(self, checkpoint: Path | None) -> None:
        """Takes up a checkpoint, if there is one."""
        session, directory = self.session, Path(self.session.config.output.directory)
        if checkpoint is not None:
            self.step = self.checkpoints.load(checkpoint)
            rate = session.config.optimizer.learning_rate
            set_learning_rate(session.optimizer, session.schedule.scheduler, rate)
        elif session.config.output.resume is not None:
            logger.warning("there is no checkpoint in %s yet; starting anew.", directory)
        if session.accelerator.is_main_process:
            directory.mkdir(parents=True, exist_ok=True)
            trim(directory, self.step)
        self._tell(lambda observer: observer.started(session, self.step))

    def finish(self) -> None:
        """All updates that are left."""
        settings, output = self.session.config.optimizer, self.session.config.output
        while self.step < settings.max_steps:
            self.rate = self.session.schedule.get_last_lr()[0]
            self.update()
            self.step += 1
            saving = self.step == settings.max_steps or self.step % output.checkpoint_every == 0
            if saving or self.step % output.log_every == 0:
                self._report()
            if saving:
                self.checkpoints.save(self.step)
            self._tell(lambda observer: observer.updated(self.session, self.step))

    def update(self) -> None:
        """One update of the student, whose figures stay on the device."""
        session = self.session
        accelerator, settings = session.accelerator, session.config.optimizer
        micro_steps = settings.gradient_accumulation_steps
        losses: list[Tensor] = []
        norm: Any = None
        for number in range(self.step * micro_steps, (self.step + 1) * micro_steps):
            pairs = session.pairs.next(number, self.step / settings.max_steps, session.student)
            with accelerator.accumulate(session.student):
                step = distillation_step(session.student, pairs, session.geometry, session.config.loss)
                accelerator.backward(step.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                session.optimizer.step()
                session.optimizer.zero_grad()
            losses.append(step.loss.detach().float())
            self._windows.append(torch.stack([step.window_sums, step.window_counts]))
            self._rows += len(pairs.index)
        session.schedule.step()
        if session.ema is not None:
            session.ema.step(session.trained.values())
        self._losses.append(torch.stack(losses).mean())
        # DeepSpeed clips by itself and tells no norm.
        self._norms.append(torch.as_tensor(0.0 if norm is None else norm, device=self._losses[-1].device).float())

    def read(self) -> Progress:
        """Waits for the device and all processes; the one place where losses are read."""
        accelerator, max_steps = self.session.accelerator, self.session.config.optimizer.max_steps
        losses = accelerator.reduce(torch.stack(self._losses), "mean").tolist()
        sums, counts = accelerator.reduce(torch.stack(self._windows).sum(0), "sum").tolist()
        seconds = time.perf_counter() - self._since
        progress = Progress(
            step=self.step,
            max_steps=max_steps,
            losses=losses,
            window_losses=[total / count if count else None for total, count in zip(sums, counts, strict=True)],
            gradient_norms=torch.stack(self._norms).tolist(),
            learning_rate=self.rate,
            samples_per_second=self._rows * accelerator.num_processes / seconds,
            eta_seconds=(max_steps - self.step) * seconds / len(losses),
        )
        self._forget()
        return progress

    def _report(self) -> None:
        """Reads the losses, makes sure that they are sound, and tells of them."""
        session, output = self.session, Path(self.session.config.output.directory)
        progress = self.read()
        # In half precision the gradient scaler skips updates whose gradients overflow, which is no divergence.
        norms = [] if session.accelerator.mixed_precision == "fp16" else progress.gradient_norms
        if problem := self.guard.problem(progress.losses, norms):
            present = list_checkpoints(output)
            kept = f"{present[-1]} is kept" if present else "there is no checkpoint yet"
            raise DivergenceError(f"the training diverged by step {self.step}: {problem}; {kept}. {self.guard.advice}")
        if session.accelerator.is_main_process:
            append_line(output / METRICS, asdict(progress))
        session.accelerator.log(progress.figures(), step=self.step)
        self._tell(lambda observer: observer.read(progress))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Tells all observers, whose time is no part of the speed."""
        began = time.perf_counter()
        for observer in self.observers:
            what(observer)
        self._since += time.perf_counter() - began

    def _forget(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._windows: list[Tensor] = []
        self._rows = 0
        self._since = time.perf_counter()


class DivergenceGuard:
    """Finds losses that are not finite, or have exploded, in the order in which they come."""

    def __init__(self, config: DistillConfig) -> None:
        changes = [f"lower optimizer.learning_rate (now {config.optimizer.learning_rate:g})"]
        if "fp16" == config.optimizer.mixed_precision or config.teacher.dtype == "float16":
            changes.append("use bf16 instead of half precision")
        if config.teacher.cfg_mode == "fixed":
            changes.append(f"lower teacher.guidance_scale (now {config.teacher.guidance_scale:g})")
        self.advice = f"To go on, {' or '.join(changes)}, and pass output.resume=latest."
        self._earlier = [0.0, 0]  # sum of logarithms, and how many
        self._recent = deque[float]()

    def problem(self, losses: Sequence[float], norms: Sequence[float]) -> str | None:
        """What is wrong with the next updates, if anything."""
        if not all(map(math.isfinite, (*losses, *norms))):
            return "a loss or the norm of a gradient is not finite"
        for loss in losses:
            self._recent.append(math.log(max(loss, 1e-20)))
            if len(self._recent) > _JUDGED:
                self._earlier = [self._earlier[0] + self._recent.popleft(), self._earlier[1] + 1]
            if self._earlier[1] >= _JUDGED:
                ratio = math.exp(sum(self._recent) / _JUDGED - self._earlier[0] / self._earlier[1])
                if ratio > EXPLOSION:
                    return f"its losses are {ratio:.3g} times the earlier ones"
        return None
