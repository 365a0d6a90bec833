"""Stops a training that went wrong, and says what to change."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median, quantiles

from .config import DistillConfig

EXPLOSION = 10.0
"""Recent losses of this many times the usual ones are an explosion."""
_RECENT = 10  # losses; single ones jump, as windows differ in their losses by orders of magnitude
_HISTORY = 200
_LEAST = 20  # losses before there is a usual one


class DivergenceError(ValueError):
    """The training diverged; the message says where, what is kept, and what to change."""


class DivergenceGuard:
    """Watches the losses of the updates, in order.

    Args:
        advice: what to change, as a sentence.
        losses: of an earlier part of the training, as `losses` gives them.
    """

    def __init__(self, advice: str, losses: Sequence[float] = ()) -> None:
        self._advice = advice
        self._losses = deque(losses, maxlen=_HISTORY)

    @property
    def losses(self) -> list[float]:
        """What the guard goes by, for `losses` of the next."""
        return list(self._losses)

    def check(self, losses: Sequence[float], norms: Sequence[float], first: int, kept: str) -> None:
        """Takes in the losses of updates `first`, `first` + 1, ...

        Args:
            losses: one for each update.
            norms: of the gradients, likewise; empty where the optimizer skips those that are not finite.
            first: number of the first update.
            kept: where the training can go on from, for the message.

        Raises:
            DivergenceError: a loss or norm is not finite, or most of the recent losses are far above the usual ones.
        """
        for name, values in (("loss", losses), ("norm of the gradient", norms)):
            for step, value in enumerate(values, start=first):
                if not math.isfinite(value):
                    raise DivergenceError(f"the {name} is {value} at step {step}; {kept}. {self._advice}")
        for step, loss in enumerate(losses, start=first):
            self._losses.append(loss)
            usual, recent = self.losses[:-_RECENT], self.losses[-_RECENT:]
            if len(usual) >= _LEAST and median(recent) > max(EXPLOSION * median(usual), _high(usual)):
                raise DivergenceError(
                    f"the loss exploded to {median(recent):.4g} at step {step}, from {median(usual):.4g}; {kept}. "
                    f"{self._advice}"
                )


def _high(losses: Sequence[float]) -> float:
    """What one in twenty losses exceeds."""
    return quantiles(losses, n=20)[-1]


def advice(config: DistillConfig) -> str:
    """What is worth changing when this configuration diverges, likeliest first."""
    changes = [f"lower optimizer.learning_rate (now {config.optimizer.learning_rate:g})"]
    if config.optimizer.mixed_precision == "fp16" or config.teacher.dtype == "float16":
        changes.append("use bf16 or float32 instead of half precision (optimizer.mixed_precision, teacher.dtype)")
    if config.teacher.cfg_mode == "fixed" and config.teacher.guidance_scale > 1:
        changes.append(f"lower teacher.guidance_scale (now {config.teacher.guidance_scale:g})")
    if config.loss.weighting in ("endpoint", "reciprocal", "window"):
        changes.append(f"weigh more evenly than loss.weighting={config.loss.weighting!r}, or lower loss.max_weight")
    if config.optimizer.max_grad_norm > 1:
        changes.append(f"lower optimizer.max_grad_norm (now {config.optimizer.max_grad_norm:g})")
    if config.optimizer.warmup_steps == 0:
        changes.append("warm up (optimizer.warmup_steps, schedule constant_with_warmup)")
    return f"To go on, {'; or '.join(changes)}, and resume with output.resume=latest."
