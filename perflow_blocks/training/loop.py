"""The training loop, on accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from torch import Tensor

from .checkpoints import Checkpoints, Position, find_checkpoint, list_checkpoints
from .config import DistillConfig
from .guard import DivergenceGuard, advice
from .layout import METRICS, READINGS
from .optimizers import set_learning_rate
from .preflight import require_possible
from .progress import Meter, MetricsFile, Progress
from .result import TrainingResult, write_result
from .session import TRACKER_NAME, Session, open_session
from .step import distillation_step

logger = logging.get_logger(__name__)


class Observer:
    """Sees a training happen; every process calls it. What it does not override does nothing."""

    def started(self, session: Session, step: int) -> None:
        """Before the first update, of which `step` were done in an earlier run."""

    def updated(self, session: Session, step: int) -> None:
        """After each update; reading a tensor here makes the loop wait for the device."""

    def read(self, progress: Progress) -> None:
        """After the losses were read."""


def train(config: DistillConfig, observers: Sequence[Observer] = ()) -> TrainingResult:
    """Distils a student as configured and writes the result; every process of the launch calls it.

    Raises:
        ConfigError: with everything that stands in the way, before any weight is read.
        DivergenceError: the training diverged; the last checkpoint before is kept.
        ValueError: weights or data that cannot be read after all.
    """
    require_possible(config)
    checkpoint = find_checkpoint(config)
    session = open_session(config)
    session.accelerator.init_trackers(TRACKER_NAME, config=_flat(config))
    try:
        run = _Run(session, observers)
        run.start(checkpoint)
        run.finish()
        return write_result(session, run.position.step, Path(config.output.directory) / METRICS)
    finally:
        session.accelerator.end_training()


class _Run:
    """The updates of a session, with what is read and saved between them."""

    def __init__(self, session: Session, observers: Sequence[Observer]) -> None:
        config = session.config
        self.session = session
        self.observers = observers
        self.meter = Meter(session.accelerator, config.optimizer.max_steps)
        self.checkpoints = Checkpoints(session.accelerator, config, session.data, session.pairs)
        self.position = Position()
        self.saved = 0
        self.rate = 0.0
        self.guard = DivergenceGuard(advice(config))
        self.metrics: MetricsFile | None = None

    def start(self, checkpoint: Path | None) -> None:
        """Takes up a checkpoint, if there is one."""
        session = self.session
        if checkpoint is not None:
            self.position = self.checkpoints.load(checkpoint)
            self.saved = self.position.step
            if session.ema is not None:
                session.ema.to(session.accelerator.device)
            rate = session.config.optimizer.learning_rate
            set_learning_rate(session.optimizer, session.schedule.scheduler, rate)
            self.guard = DivergenceGuard(advice(session.config), self.position.losses)
        elif session.config.output.resume is not None:
            logger.warning("there is no checkpoint in %s yet; starting anew.", session.config.output.directory)
        if session.accelerator.is_main_process:
            directory = Path(session.config.output.directory)
            self.metrics = MetricsFile(directory, self.position.step)
            if (directory / READINGS).exists():  # what is beyond goes, whether this run validates or not
                MetricsFile(directory, self.position.step, READINGS)
        self._tell(lambda observer: observer.started(session, self.position.step))

    def finish(self) -> None:
        """All updates that are left."""
        settings, output = self.session.config.optimizer, self.session.config.output
        while self.position.step < settings.max_steps:
            self.rate = self.session.schedule.get_last_lr()[0]
            norm = self._update()
            self.meter.finish_update(norm)
            step = self.position.step + 1
            self.position = replace(
                self.position, step=step, micro_step=self.position.micro_step + settings.gradient_accumulation_steps
            )
            last = step == settings.max_steps
            saving = last or step % output.checkpoint_every == 0
            if saving or step % output.log_every == 0:
                self._read()
            if saving:
                self._save()
            self._tell(lambda observer: observer.updated(self.session, self.position.step))

    def _save(self) -> None:
        self.checkpoints.save(replace(self.position, losses=tuple(self.guard.losses)))
        self.saved = self.position.step

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Tells all observers; the time that they take is none of the training's.

        What an observer raises ends the training, whose updates are saved before.
        """
        began = time.perf_counter()
        try:
            for observer in self.observers:
                what(observer)
        except Exception:
            self._rescue()
            raise
        self.meter.leave_out(time.perf_counter() - began)

    def _rescue(self) -> None:
        """Saves what was not saved yet, unless other processes would have to take part: they know of no failure."""
        if self.session.accelerator.num_processes == 1 and self.position.step > self.saved:
            if self.meter.pending:
                self._read()
            self._save()

    def _update(self) -> Tensor | float:
        """One update of the student; the norm of its gradient, on the device."""
        session = self.session
        accelerator, settings = session.accelerator, session.config.optimizer
        progress = self.position.step / settings.max_steps
        norm: Any = None
        for number in range(settings.gradient_accumulation_steps):
            pairs = session.pairs.next(self.position.micro_step + number, progress, session.student)
            with accelerator.accumulate(session.student):
                step = distillation_step(session.student, pairs, session.geometry, session.config.loss)
                accelerator.backward(step.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(session.student.parameters(), settings.max_grad_norm)
                session.optimizer.step()
                session.optimizer.zero_grad()
            self.meter.add(step, len(pairs.index))
        session.schedule.step()
        if session.ema is not None:
            session.ema.step(session.trained.values())
        return 0.0 if norm is None else norm  # DeepSpeed clips by itself and tells none

    def _read(self) -> None:
        """Reads the losses, makes sure that they are sound, and tells of them."""
        session = self.session
        step, pending = self.position.step, self.meter.pending
        progress, windows = self.meter.read(step, self.rate)
        # In half precision the gradient scaler skips updates whose gradients overflow, which is no divergence.
        norms = () if session.accelerator.mixed_precision == "fp16" else progress.gradient_norms
        self.guard.check(progress.losses, windows, norms, step - pending + 1, self._kept())
        if self.metrics is not None:
            self.metrics.append(progress)
        session.accelerator.log(progress.figures(), step=step)
        self._tell(lambda observer: observer.read(progress))

    def _kept(self) -> str:
        present = list_checkpoints(self.checkpoints.directory)
        return f"{present[-1]} is kept" if present else "no checkpoint was written before"


def _flat(config: DistillConfig) -> dict[str, Any]:
    """The settings for a tracker, which takes numbers and text."""
    return {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in config.flat().items()
    }
