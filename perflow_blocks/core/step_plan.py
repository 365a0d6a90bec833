"""A sampling schedule as tables on the host: each step is one fixed linear map, known before the loop starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .parameterization import chord_coefficients, weighted_sum, window_table, x0_coefficients
from .windows import TimeWindows

# In timesteps: makes the truncation of t*T immune to rounding (0.29 * 1000 is 289.99999999999994).
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The steps of one schedule; every field but the first holds one Python number per step, in float64.

    Attributes:
        prediction_type: what the network predicts.
        timesteps: what the UNet is given, descending, in [1, num_train_timesteps].
        times: `timesteps / num_train_timesteps`, where each step starts.
        next_times: where each step ends; the last one at the end of the last window.
        window_index, window_start, window_end: the window that a step lies in.
        alpha_start, alpha_end: abar at the two ends of that window.
        sample_coeff, output_coeff: (A, B) of the Euler step `z' = A z + B output`.
        x0_sample_coeff, x0_output_coeff: (C, D) of the prediction `x0 = C z + D output`.
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

    def __len__(self) -> int:
        return len(self.timesteps)

    def begins_window(self, i: int) -> bool:
        """Whether step i is the first of its window in this plan."""
        return i == 0 or self.window_index[i] != self.window_index[i - 1]

    def section(self, first: int, stop: int) -> StepPlan:
        """The steps `first` to `stop - 1` alone: where a run begins late (image-to-image) or leaves off early."""
        per_step = (field.name for field in fields(self) if field.name != "prediction_type")
        return replace(self, **{name: getattr(self, name)[first:stop] for name in per_step})

    def coefficients(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table (num_steps, 4) with the columns A, B, C, D, copied to the device once."""
        columns = (self.sample_coeff, self.output_coeff, self.x0_sample_coeff, self.x0_output_coeff)
        return torch.tensor(columns, dtype=torch.float64).T.to(dtype=dtype).contiguous().to(device=device)


def build_step_plan(
    windows: TimeWindows,
    alphas_cumprod: Tensor,
    prediction_type: str,
    times: Sequence[float],
    *,
    final_alpha_cumprod: float | None = None,
) -> StepPlan:
    """The plan for steps that start at the given continuous times and end at the end of the last window.

    Each time is first truncated to its timestep, `int(t * T)`, since that is what the network sees. A schedule may
    begin inside any window (image-to-image does), but every window start below that must be one of its timesteps: the
    velocity is constant inside a window only.

    Args:
        windows: the time windows.
        alphas_cumprod: abar, float64 of shape (num_train_timesteps,), on the host.
        prediction_type: one of `PREDICTION_TYPES`.
        times: start times of the steps, descending, for example `windows.distribute_steps(6)`.
        final_alpha_cumprod: abar at t = 0, if not `alphas_cumprod[0]`.

    Raises:
        ValueError: no times, repeated or ascending timesteps, one outside the windows, or a missing window start.
    """
    total = windows.num_train_timesteps
    timesteps = [truncated_timestep(t, total) for t in times]
    _check_timesteps(timesteps, windows)
    starts = [timestep / total for timestep in timesteps]
    stops = [*starts[1:], windows.boundaries[-1]]
    indices = [windows.index(t) for t in starts]
    rows = window_table(windows, alphas_cumprod, final_alpha_cumprod=final_alpha_cumprod)
    members = [rows[k] for k in indices]
    step_maps: list[tuple[float, float]] = []
    x0_maps: list[tuple[float, float]] = []
    for t, stop, window in zip(starts, stops, members, strict=True):
        lam, eta = chord_coefficients(window, t, prediction_type)
        # Euler on the chord, z' = z + (t' - t) (z_e - z)/(e - t) with z_e = lam z + eta output.
        fraction = (stop - t) / (window.end - t)
        step_maps.append((float(1.0 + fraction * (lam - 1.0)), float(fraction * eta)))
        c, d = x0_coefficients(window, t, prediction_type)
        x0_maps.append((float(c), float(d)))
    return StepPlan(
        prediction_type=prediction_type,
        timesteps=tuple(timesteps),
        times=tuple(starts),
        next_times=tuple(stops),
        window_index=tuple(indices),
        window_start=tuple(float(window.start) for window in members),
        window_end=tuple(float(window.end) for window in members),
        alpha_start=tuple(float(window.alpha_start) for window in members),
        alpha_end=tuple(float(window.alpha_end) for window in members),
        sample_coeff=tuple(a for a, _ in step_maps),
        output_coeff=tuple(b for _, b in step_maps),
        x0_sample_coeff=tuple(c for c, _ in x0_maps),
        x0_output_coeff=tuple(d for _, d in x0_maps),
    )


def apply_step(sample: Tensor, output: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """One row of a plan on a sample: `a sample + b output`, of the sample's shape and type.

    (A, B) gives the next sample, (C, D) the predicted clean one. Nothing crosses between host and device when a and b
    are numbers, or 0-dimensional tensors on the sample's device (elements of `StepPlan.coefficients`).
    """
    return weighted_sum(sample, output, a, b)


def select_row(table: Tensor, timesteps: Tensor, timestep: Tensor) -> Tensor:
    """The row of `table` (num_steps, 4) whose entry of `timesteps` (num_steps,) equals the one-element `timestep`.

    All on one device, with nothing read back; a row of nan where `timesteps` does not hold it.
    """
    hit = timesteps == timestep.reshape(1)
    row = torch.where(hit.unsqueeze(1), table, 0.0).sum(dim=0)
    return torch.where(hit.any(), row, math.nan)


def truncated_timestep(t: float, num_train_timesteps: int) -> int:
    """`int(t * T)` for a continuous time t, immune to the rounding of the product."""
    return math.floor(t * num_train_timesteps + _ROUNDING)


def _check_timesteps(timesteps: Sequence[int], windows: TimeWindows) -> None:
    total = windows.num_train_timesteps
    highest, lowest = (
        truncated_timestep(windows.boundaries[0], total),
        truncated_timestep(windows.boundaries[-1], total) + 1,
    )
    if not timesteps:
        raise ValueError("timesteps is empty; pass at least one timestep per time window.")
    if any(following >= current for current, following in itertools.pairwise(timesteps)):
        raise ValueError(
            f"timesteps {_shorten(timesteps)} are not strictly descending; pass each once, from noise to data, "
            f"or fewer steps than the {len(timesteps)} asked for."
        )
    outside = [timestep for timestep in timesteps if not lowest <= timestep <= highest]
    if outside:
        raise ValueError(f"timesteps {outside} lie outside [{lowest}, {highest}]; pass whole numbers in that range.")
    given = set(timesteps)
    needed = [truncated_timestep(start, total) for start in windows.starts]
    missing = [start for start in needed if start < timesteps[0] and start not in given]
    if missing:
        raise ValueError(
            f"timesteps {_shorten(timesteps)} step over the window start(s) {missing}, but a step must not leave its "
            f"window; insert {', '.join(map(str, missing))}."
        )


def _shorten(timesteps: Sequence[int]) -> str:
    shown = ", ".join(map(str, timesteps[:12]))
    return f"[{shown}, ...]" if len(timesteps) > 12 else f"[{shown}]"
