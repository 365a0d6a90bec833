"""Which part of a schedule is run: by strength, and by the shares of the denoising that base and refiner do."""

from __future__ import annotations

from numbers import Real
from typing import Any

from diffusers.utils import logging

from ..core.step_plan import StepPlan
from ..core.windows import TimeWindows

logger = logging.get_logger(__name__)


def check_strength(strength: Any) -> None:
    """
    Raises:
        ValueError: not a number in (0, 1].
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0.0 < float(strength) <= 1.0:
        raise ValueError(
            f"strength={strength!r} is outside (0, 1]; pass for example 0.5 (1 redraws everything, 0.1 little)."
        )


def check_denoising_range(start: Any, end: Any) -> None:
    """
    Raises:
        ValueError: `denoising_start` outside (0, 1), `denoising_end` outside (0, 1], or the end not above the start.
    """
    for name, value, closed in (("denoising_start", start, False), ("denoising_end", end, True)):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (number and (0.0 < value < 1.0 or (closed and value == 1.0))):
            raise ValueError(
                f"{name}={value!r} is outside (0, 1{']' if closed else ')'}; pass a share, or leave it out."
            )
    if start is not None and end is not None and end <= start:
        raise ValueError(
            f"denoising_end={end} is not above denoising_start={start}, so nothing is left to run; raise the one or "
            "lower the other."
        )


def end_time(windows: TimeWindows, denoising_end: float | None) -> float:
    """The time at which a run ends: the end of the last window, or the boundary nearest to `denoising_end`."""
    check_denoising_range(None, denoising_end)
    if denoising_end is None or denoising_end == 1.0:
        return windows.boundaries[-1]
    return _snap(windows, "denoising_end", denoising_end)


def start_time(windows: TimeWindows, denoising_start: float) -> float:
    """The boundary nearest to the time at which the earlier run left off."""
    check_denoising_range(denoising_start, None)
    return _snap(windows, "denoising_start", denoising_start)


def before(plan: StepPlan, time: float) -> StepPlan:
    """The steps of the plan that start before it reaches `time`, a window boundary."""
    count = sum(start > time for start in plan.times)
    return plan if count == len(plan) else plan.section(0, count)


def _snap(windows: TimeWindows, name: str, share: float) -> float:
    """The inner boundary nearest to time 1 - share; a velocity is that of its whole window, so cuts are made there."""
    inner = windows.boundaries[1:-1]
    if not inner:
        raise ValueError(
            f"{name}={share} asks to cut a schedule of one window, which has no inner boundary; leave it out."
        )
    nearest = min(inner, key=lambda boundary: abs(boundary - (1.0 - share)))
    used = 1.0 - nearest
    if abs(used - share) * windows.num_train_timesteps >= 0.5:
        logger.warning("%s=%s lies inside a time window; %s=%.4g is used, a window boundary.", name, share, name, used)
    return nearest
