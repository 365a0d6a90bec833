"""Stops a training that went wrong, and says what to change."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from statistics import fmean, median

from .config import DistillConfig
from .progress import WindowLosses

EXPLOSION = 10.0
"""Recent losses of this many times the usual ones are an explosion."""
_HISTORY = 500  # updates
_RECENT = 20  # updates that are judged together: with a row or two in each, single ones jump by orders of magnitude
_LEAST = 10  # losses of a window before it has a usual one
_JUDGED = 15  # of the recent updates, at least, have a row of such a window
_SCATTER = 1.45  # times the usual jump from one loss to the next: 1.4 standard deviations of normal logarithms
_ERRORS = 3.0  # standard errors by which the usual losses may be too low


class DivergenceError(ValueError):
    """The training diverged; the message says where, what is kept, and what to change."""


class DivergenceGuard:
    """Watches the losses of the updates, in order.

    Windows differ in their losses by orders of magnitude, and an update may hold rows of one of them only. So every
    loss is compared with the usual one of its own window, and the recent updates are judged by these ratios.

    Args:
        advice: what to change, as a sentence.
        losses: of an earlier part of the training, as `losses` gives them.
    """

    def __init__(self, advice: str, losses: Sequence[WindowLosses] = ()) -> None:
        self._advice = advice
        self._losses = deque(losses, maxlen=_HISTORY)

    @property
    def losses(self) -> list[WindowLosses]:
        """What the guard goes by, for `losses` of the next."""
        return list(self._losses)

    def check(
        self,
        losses: Sequence[float],
        windows: Sequence[WindowLosses],
        norms: Sequence[float],
        first: int,
        kept: str,
    ) -> None:
        """Takes in the losses of updates `first`, `first` + 1, ...

        Args:
            losses: one for each update.
            windows: those of the windows of each update.
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
        for step, row in enumerate(windows, start=first):
            self._losses.append(row)
            times = _explosion(self.losses)
            if times is not None:
                raise DivergenceError(
                    f"the loss exploded to {times:.4g} times the usual at step {step}; {kept}. {self._advice}"
                )


def _explosion(updates: Sequence[WindowLosses]) -> float | None:
    """How many times the usual loss the recent updates have, where that is an explosion.

    Taken in logarithms: the median of the recent updates has to exceed `EXPLOSION`, and what scatters so high anyway.
    The scatter comes from the jumps between neighbouring losses of a window, which a steady rise does not enlarge.
    """
    earlier, recent = updates[:-_RECENT], updates[-_RECENT:]
    if not earlier:
        return None
    columns = [[math.log(loss) for loss in column if loss] for column in zip(*earlier, strict=True)]
    usual = [median(column) if len(column) >= _LEAST else None for column in columns]
    ratios = [
        [math.log(loss) - level for loss, level in zip(update, usual, strict=True) if loss and level is not None]
        for update in recent
    ]
    scores = [fmean(found) for found in ratios if found]
    if len(scores) < _JUDGED:
        return None
    level = median(scores)
    jump = median(abs(after - before) for column in columns for before, after in itertools.pairwise(column))
    uncertain = _ERRORS * jump / math.sqrt(len(earlier))
    return math.exp(level) if level > max(math.log(EXPLOSION), _SCATTER * jump) + uncertain else None


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
        changes.append("warm up (optimizer.warmup_steps from the first update on, schedule constant_with_warmup)")
    return f"To go on, {'; or '.join(changes)}, and resume with output.resume=latest."
