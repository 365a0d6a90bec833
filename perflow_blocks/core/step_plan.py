"""A sampling schedule as tables on the host: each step is one fixed linear map, known before the loop starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .parameterization import Scalar, WindowAlpha, chord_coefficients, x0_coefficients
from .windows import TimeWindows

# In timesteps: makes the truncation of t*T immune to rounding (0.29 * 1000 is 289.99999999999994).
_ROUNDING = 1e-6

_LARGEST_RATIO = 2.5  # of a step's length to that of the step before, beyond which extrapolation does harm


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The steps of one schedule; every field but the first holds one Python number per step, in float64.

    `timesteps`, in [1, num_train_timesteps], are what the UNet is given. A step starts at `times`, which is
    `timesteps / num_train_timesteps`, and ends at `next_times`; the windows' fields are those of the window it lies
    in. The Euler step is `z' = A z + B output` with A, B = `sample_coeff`, `output_coeff`; the predicted clean sample
    is `x0 = C z + D output` with C, D = `x0_sample_coeff`, `x0_output_coeff`.

    `step_ratio` is 0 for an Euler step. For a step of second order it is the step's length divided by that of the step
    before it (see `second_order_step`). `uncorrected` is the same plan without the scheduler's `theta`, if set.
    """

    prediction_type: str
    timesteps: tuple[int, ...]
    times: tuple[float, ...]
    next_times: tuple[float, ...]
    window_index: tuple[int, ...]
    window_start: tuple[float, ...]
    window_end: tuple[float, ...]
    alpha_start: tuple[float, ...]
    alpha_end: tuple[float, ...]
    sample_coeff: tuple[float, ...]
    output_coeff: tuple[float, ...]
    x0_sample_coeff: tuple[float, ...]
    x0_output_coeff: tuple[float, ...]
    step_ratio: tuple[float, ...]
    uncorrected: StepPlan | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def begins_window(self, i: int) -> bool:
        """Whether step i is the first of its window in this plan."""
        return i == 0 or self.window_index[i] != self.window_index[i - 1]

    def section(self, first: int, stop: int) -> StepPlan:
        """Steps `first` to `stop - 1` alone: a run that begins late (image-to-image) or ends early."""
        cut: dict[str, Any] = {name: v[first:stop] for name, v in vars(self).items() if isinstance(v, tuple)}
        cut["step_ratio"] = (0.0, *self.step_ratio[first + 1 : stop])  # nothing comes before the first step now
        return replace(self, **cut, uncorrected=self.uncorrected and self.uncorrected.section(first, stop))

    def coefficients(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table (num_steps, 4) with the columns A, B, C, D, as a new tensor on the device."""
        columns = (self.sample_coeff, self.output_coeff, self.x0_sample_coeff, self.x0_output_coeff)
        table = torch.tensor(columns, dtype=torch.float64, device="cpu").T
        return table.to(dtype=dtype).contiguous().to(device=device)


def build_step_plan(
    windows: TimeWindows,
    rows: Sequence[WindowAlpha],
    prediction_type: str,
    times: Sequence[float],
    *,
    solver_order: int = 1,
    theta: Sequence[Sequence[float]] | None = None,
) -> StepPlan:
    """The plan for steps that start at the given continuous times and end at the end of the last window.

    Each time is first truncated to its timestep, which is what the network sees. A schedule may begin inside any
    window (image-to-image does), but must hold every window start below: the velocity is constant inside a window
    only. `rows` are the windows' numbers, from `window_table`.

    With `solver_order=2` a step is of second order unless it is the first of its window or of the plan, or much longer
    than the step before it. `theta` holds two numbers for each window: A is multiplied by 1 plus the first, B by 1
    plus the second.

    Raises:
        ValueError: no times, repeated or ascending timesteps, one outside the windows, or a missing window start.
    """
    total = windows.num_train_timesteps
    timesteps = tuple(truncated_timestep(t, total) for t in times)
    _check_timesteps(timesteps, windows)
    starts = tuple(timestep / total for timestep in timesteps)
    stops = (*starts[1:], windows.boundaries[-1])
    indices = tuple(windows.index(t) for t in starts)
    members = [rows[k] for k in indices]
    maps: list[tuple[float, ...]] = []
    for t, stop, window, k in zip(starts, stops, members, indices, strict=True):
        lam, eta = chord_coefficients(window, t, prediction_type)
        # Euler on the chord, z' = z + (t' - t) (z_e - z)/(e - t) with z_e = lam z + eta output.
        fraction = (stop - t) / (window.end - t)
        factor_a, factor_b = (1.0 + correction for correction in (theta[k] if theta else (0.0, 0.0)))
        euler = (factor_a * (1.0 + fraction * (lam - 1.0)), factor_b * fraction * eta)
        maps.append(tuple(map(float, (*euler, *x0_coefficients(window, t, prediction_type)))))
    a, b, c, d = zip(*maps, strict=True)
    ratios = [0.0] * len(starts)
    for i in range(1, len(starts)):
        if solver_order == 2 and indices[i] == indices[i - 1]:
            ratio = (starts[i] - stops[i]) / (starts[i - 1] - stops[i - 1])
            ratios[i] = ratio if ratio <= _LARGEST_RATIO else 0.0
    uncorrected = None
    if theta:
        uncorrected = build_step_plan(windows, rows, prediction_type, times, solver_order=solver_order)
    return StepPlan(
        prediction_type=prediction_type,
        timesteps=timesteps,
        times=starts,
        next_times=stops,
        window_index=indices,
        window_start=tuple(float(window.start) for window in members),
        window_end=tuple(float(window.end) for window in members),
        alpha_start=tuple(float(window.alpha_start) for window in members),
        alpha_end=tuple(float(window.alpha_end) for window in members),
        sample_coeff=a,
        output_coeff=b,
        x0_sample_coeff=c,
        x0_output_coeff=d,
        step_ratio=tuple(ratios),
        uncorrected=uncorrected,
    )


def apply_step(sample: Tensor, output: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """`a sample + b output` in float32 or better, returned in the sample's type: one step, in two kernels.

    A coefficient is a number, a 0-dimensional tensor on the sample's device, or a tensor (batch,) with one value per
    row of the sample. Nothing crosses between host and device.
    """
    dtype = torch.promote_types(sample.dtype, torch.float32)
    sample, output = torch.broadcast_tensors(sample, output)
    total = sample * _weight(a, sample, dtype) if isinstance(a, Tensor) else sample.to(dtype) * a
    if isinstance(b, Tensor):
        total.addcmul_(output, _weight(b, output, dtype))
    else:
        total.add_(output, alpha=b)
    return total.to(sample.dtype)


class EarlierStep(NamedTuple):
    """What the next step of second order builds on."""

    sample: Tensor  # a copy of where the step ended
    change: Tensor  # the Euler step's z' - z, float32 or better
    correction: Tensor | None  # what was added to the Euler step


def second_order_step(
    sample: Tensor, output: Tensor, a: Scalar, b: Scalar, ratio: Scalar, earlier: EarlierStep | None
) -> tuple[Tensor, EarlierStep]:
    """The Adams-Bashforth step `z' = z + change + r/2 (change - r earlier change)` with change = (a - 1) z + b output.

    For equal steps, r = 1, that is `z + 3/2 change - 1/2 earlier change`. `ratio` r is a number or a 0-dimensional
    tensor on the device. The step is the Euler step `a z + b output` where r is 0, where there is no `earlier` step,
    and in each row whose sample is not the one that the earlier step ended with. Nothing is read back from the device.
    """
    wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
    change, after, correction = apply_step(wide, output, a - 1.0, b), apply_step(wide, output, a, b), None
    if earlier is not None and earlier.sample.shape == sample.shape:
        follows = (sample == earlier.sample).flatten(1).all(1)
        correction = (change - ratio * earlier.change) * _weight(0.5 * ratio * follows, change, change.dtype)
        after = after + correction
    after = after.to(sample.dtype)
    return after, EarlierStep(after.clone(), change, correction)


def _weight(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient with as many dimensions as `like`: one without dimensions would not promote half precision."""
    return value.to(dtype).reshape(-1, *(1,) * (like.ndim - 1)) if like.ndim else value.to(dtype)


def select_row(table: Tensor, timesteps: Tensor, timestep: Tensor) -> Tensor:
    """The row of `table` (num_steps, 4) whose entry of `timesteps` (num_steps,) equals the one-element `timestep`.

    All on one device, with nothing read back. The row is nan if `timesteps` does not hold it.
    """
    hit = timesteps == timestep.reshape(1)
    row = torch.where(hit.unsqueeze(1), table, 0.0).sum(dim=0)
    return torch.where(hit.any(), row, math.nan)


def truncated_timestep(t: float, num_train_timesteps: int) -> int:
    """`int(t * T)` for a continuous time t, immune to the rounding of the product."""
    return math.floor(t * num_train_timesteps + _ROUNDING)


def _check_timesteps(timesteps: Sequence[int], windows: TimeWindows) -> None:
    if not timesteps:
        raise ValueError("timesteps=[] must hold at least one timestep per time window.")
    for current, following in itertools.pairwise(timesteps):
        if following >= current:
            fault = f"{current} is followed by {following}; ask for fewer than {len(timesteps)} steps"
            raise ValueError(f"timesteps must be strictly descending, but {fault}, or list each timestep once.")
    total = windows.num_train_timesteps
    highest = truncated_timestep(windows.boundaries[0], total)
    lowest = truncated_timestep(windows.boundaries[-1], total) + 1
    outside = [timestep for timestep in timesteps if not lowest <= timestep <= highest]
    if outside:
        raise ValueError(f"timesteps={outside} must be in [{lowest}, {highest}].")
    needed = [truncated_timestep(start, total) for start in windows.starts]
    missing = [start for start in needed if start < timesteps[0] and start not in timesteps]
    if missing:
        inserted = ", ".join(map(str, missing))
        raise ValueError(f"timesteps must include the window starts below {timesteps[0]}; insert {inserted}.")
