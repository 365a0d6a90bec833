"""A training: everything that it works with, and the loop over its updates, on accelerate."""

from __future__ import annotations

import math
import time
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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import Tensor

from .checkpoints import METRICS, Checkpoints, append_line, find_checkpoint, list_checkpoints, trim
from .config import DistillConfig
from .data import open_dataset
from .output import write_result
from .pairs import NoisedStarts, PairSource, TrajectoryStarts, distillation_step
from .student import build_student, set_learning_rate, trainable
from .teacher import LatentEncoder, Offload, PromptEncoder, Teacher, WindowGeometry, between, open_teacher

logger = logging.get_logger(__name__)

DIVERGED = 1e4
"""A window's mean loss above it ends the training: targets are of order one, so a student of zeros has about 1."""
_PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which alone draws validation sheets and writes the result."""


class Session:
    """A distillation in this process, with nothing taken up from a checkpoint yet.

    The accelerator has prepared `student`, `optimizer` and `schedule`. `trained` are the student's parameters that are
    trained, by their names in the bare UNet, `ema` their averages or None, `pairs` what they are trained on.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config, settings = config, config.optimizer
        # accelerate's own settings decide devices and processes, and the precision where the configuration does not.
        self.accelerator = accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            log_with=config.output.tracker,
            project_dir=config.output.directory,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
        plugin = accelerator.state.deepspeed_plugin
        if plugin is not None:  # it reads this off a prepared data loader otherwise, which there is none of
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.batch_size
        # Whether each process holds a part of the student's weights only.
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP or (plugin and plugin.zero_stage == 3)
        if settings.ema_decay and self.is_sharded:
            raise ValueError("optimizer.ema_decay needs all weights in each process, which has a part here; pass 0.")
        self.source = open_teacher(config.model)
        self.geometry = WindowGeometry(config.windows, self.source.scheduler_config, accelerator.device)
        own = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
        self.data = open_dataset(config.data, batch_size=settings.batch_size, seed=settings.seed, **own)
        # A LoRA's frozen weights have the type in which they are multiplied anyway.
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        base_dtype = half.get(accelerator.mixed_precision, torch.float32)
        student = build_student(self.source, config.model, settings, base_dtype)
        kind: Any = torch.optim.AdamW
        if settings.name == "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            kind = AdamW8bit
        rates = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
        optimizer = kind(list(trainable(student).values()), **rates)
        steps = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": settings.max_steps}
        prepared: Any = accelerator.prepare(student, optimizer, get_scheduler(settings.schedule, optimizer, **steps))
        self.student, self.optimizer, self.schedule = prepared
        self.trained = trainable(accelerator.unwrap_model(self.student))
        self.ema: EMAModel | None = None
        if settings.ema_decay:
            self.ema = EMAModel(self.trained.values(), decay=settings.ema_decay, foreach=True)
            self.ema.to(dtype=torch.float32)  # half-precision weights (DeepSpeed) would round an average's moves away
        self.teacher = self._make_teacher(base_dtype)
        self.pairs = self._make_pairs()

    def _make_teacher(self, base_dtype: torch.dtype) -> Teacher:
        config, device, dtype = self.config, self.accelerator.device, getattr(torch, self.config.teacher.dtype)
        text = self.source.load_text_pipeline(dtype)
        encoders = [getattr(text, name) for name in self.source.family.text_encoders]
        offload = _place(encoders, device, config.teacher.offload != "none")
        encoder = PromptEncoder(text, device, config.teacher.text_cache, offload)
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext
        # The frozen weights of a LoRA serve as the teacher's where they are whole and of its type. With compiled
        # blocks that would compile anew whenever the factors come and go.
        alike = config.model.student == "lora" and dtype == base_dtype and not self.is_sharded
        if alike and not config.optimizer.compile:
            unet = self.accelerator.unwrap_model(self.student)
            at_hand = partial(between, unet.disable_adapters, unet.enable_adapters)
        else:
            unet = self.source.load_unet(dtype).requires_grad_(False)
            if config.optimizer.channels_last:
                unet.to(memory_format=torch.channels_last)
            if config.optimizer.compile:
                unet.compile_repeated_blocks()
            if take_back := _place([unet], device, config.teacher.offload == "all"):
                at_hand = partial(between, nullcontext, take_back)
        return Teacher(unet, self.source.scheduler(), encoder, self.geometry, config.teacher, at_hand)

    def _make_pairs(self) -> PairSource:
        config, device = self.config, self.accelerator.device
        common: dict[str, Any] = {
            "teacher": self.teacher,
            "batches": iter(self.data),  # from the position that the data has when the first one is asked for
            "seed": config.optimizer.seed,
            "process_index": self.accelerator.process_index,
            "caption_dropout": config.loss.caption_dropout,
        }
        if config.teacher.starts == "trajectory":
            common |= {"channels": self.source.channels, "vae_factor": self.source.vae_factor}
            return TrajectoryStarts(**common, device=device, batch_size=config.optimizer.batch_size)
        vae = self.source.load_vae(getattr(torch, config.teacher.dtype))
        offload = _place([] if vae is None else [vae], device, config.teacher.offload != "none")
        return NoisedStarts(**common, latents=LatentEncoder(vae, device, offload))


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
        return sum(self.losses) / len(self.losses)

    def describe(self) -> str:
        """One line for a terminal."""
        windows = " ".join("-" if loss is None else f"{loss:.4g}" for loss in self.window_losses)
        head = f"step {self.step}/{self.max_steps}  loss {self.loss:.4g}  windows {windows}"
        eta = timedelta(seconds=round(self.eta_seconds))
        return f"{head}  lr {self.learning_rate:.3g}  {self.samples_per_second:.3g} samples/s  ETA {eta}"


class Observer:
    """Sees a training happen; every process calls it. What it does not override does nothing."""

    def started(self, session: Session, step: int) -> None:
        """Before the first update, of which `step` were done in an earlier run."""

    def updated(self, session: Session, step: int) -> None:
        """After each update; reading a tensor here makes the loop wait for the device."""

    def read(self, progress: Progress) -> None:
        """After the losses were read."""


def train(config: DistillConfig, observers: Sequence[Observer] = ()) -> None:
    """Distils a student as configured and writes the result; every process calls it. Raises as `distill` does."""
    checkpoint, session = find_checkpoint(config), Session(config)
    flat = config.flat().items()
    settings = {name: value if isinstance(value, (int, float)) else str(value) for name, value in flat}
    session.accelerator.init_trackers("perflow_distill", config=settings)
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
        self.session, self.observers = session, observers
        self.checkpoints = Checkpoints(session)
        self.parameters = list(session.student.parameters())  # a walk over all modules takes milliseconds
        self.output = Path(session.config.output.directory)
        self.step, self.rate = 0, 0.0
        self._forget()

    def start(self, checkpoint: Path | None) -> None:
        """Takes up a checkpoint, if there is one."""
        session = self.session
        if checkpoint is not None:
            self.step = self.checkpoints.load(checkpoint)
            rate = session.config.optimizer.learning_rate
            set_learning_rate(session.optimizer, session.schedule.scheduler, rate)
        elif session.config.output.resume is not None:
            logger.warning("%s holds no checkpoint yet; starting anew.", self.output)
        if session.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            trim(self.output, self.step)
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
        session, accelerator, settings = self.session, self.session.accelerator, self.session.config.optimizer
        micro_steps, losses, norm = settings.gradient_accumulation_steps, list[Tensor](), None
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
        accelerator, config, progress = self.session.accelerator, self.session.config, self.read()
        # In half precision the gradient scaler skips updates whose gradients overflow, which is no divergence.
        norms = [] if accelerator.mixed_precision == "fp16" else progress.gradient_norms
        worst = max(loss for loss in progress.window_losses if loss is not None)
        if not all(map(math.isfinite, (*progress.losses, *norms))) or worst > DIVERGED:
            present = list_checkpoints(self.output)
            raise DivergenceError(
                f"the training diverged by step {self.step} (loss {progress.loss:.4g}, worst window {worst:.4g}, "
                f"norm of the gradient {progress.gradient_norms[-1]:.4g}); {present[-1] if present else 'nothing'} is "
                f"kept. To go on, lower optimizer.learning_rate (now {config.optimizer.learning_rate:g}) or the "
                "guidance, or use bf16 instead of fp16, and pass output.resume=latest."
            )
        if accelerator.is_main_process:
            append_line(self.output / METRICS, asdict(progress))
        figures = {f"loss/window_{i}": loss for i, loss in enumerate(progress.window_losses) if loss is not None}
        figures |= {"loss": progress.loss, "gradient_norm": progress.gradient_norms[-1]}
        figures |= {"learning_rate": self.rate, "samples_per_second": progress.samples_per_second}
        accelerator.log(figures, step=self.step)
        self._tell(lambda observer: observer.read(progress))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Calls all observers. Excludes their time from the speed."""
        began = time.perf_counter()
        for observer in self.observers:
            what(observer)
        self._since += time.perf_counter() - began

    def _forget(self) -> None:
        self._losses, self._norms, self._windows = list[Tensor](), list[Tensor](), list[Tensor]()
        self._rows, self._since = 0, time.perf_counter()
