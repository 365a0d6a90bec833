"""One step of the distillation: windows as tensors, the student's loss in them, and what each row counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from ..core.distillation import draw_times, endpoint_weight, make_student_example
from ..core.noise_schedule import make_alphas_cumprod
from ..core.parameterization import WindowAlpha, window_table
from ..schedulers.pfode_solver import Conditioning
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS
from .config import LossConfig, WindowConfig

UNet = Callable[..., Any]

RECIPROCAL_FLOOR = 0.1
"""The least 1 - t that the "reciprocal" weighting divides by."""
_RECIPROCAL_MEAN = 1.0 - math.log(RECIPROCAL_FLOOR)  # of 1 / max(1 - t, floor) over t in [0, 1], for a floor of 0.1
_ROUNDING = 1e-3  # of a step between two discrete times: far above float32's rounding


class WindowGeometry:
    """The windows of a configuration on a teacher's noise schedule, with the numbers of each on a device.

    Raises:
        ValueError: windows and schedule do not fit together.
    """

    def __init__(
        self, config: WindowConfig, scheduler_config: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        schedule = {key: scheduler_config[key] for key in NOISE_SCHEDULE_KEYS if scheduler_config.get(key) is not None}
        alphas_cumprod = make_alphas_cumprod(**schedule)
        self.config = config
        self.num_train_timesteps = len(alphas_cumprod)
        self.windows = config.tile(self.num_train_timesteps)
        self._rows = torch.tensor(window_table(self.windows, alphas_cumprod), dtype=torch.float32, device=device)

    @property
    def num_windows(self) -> int:
        return self.windows.num_windows

    def rows(self, index: Tensor) -> WindowAlpha:
        """The windows of the given indices (batch,), each number a float32 tensor of that shape."""
        return WindowAlpha(*self._rows[index].unbind(-1))

    def each(self, count: int) -> list[WindowAlpha]:
        """For each window, noisiest first, its numbers `count` times over."""
        return [WindowAlpha(*row[:, None].expand(-1, count)) for row in self._rows]

    def times(self, window: WindowAlpha, uniform: Tensor) -> Tensor:
        """Training times (batch,) in each row's window, from numbers (batch,) uniform in [0, 1)."""
        t = draw_times(window, uniform, start_share=self.config.start_share)
        if self.config.times == "continuous":
            return t
        count = self.config.num_discrete_times
        # Up to the next of the equidistant times, which lies beyond the window's end and not beyond its start.
        first = torch.floor(torch.as_tensor(window.end) * count + _ROUNDING) + 1
        snapped = torch.maximum(torch.ceil(t * count - _ROUNDING), first) / count
        return torch.minimum(snapped, torch.as_tensor(window.start))

    def solver_times(self, t: Tensor) -> Tensor:
        """The times, up to a timestep below, at which the teacher's solver has the noise of the windows' numbers at t.

        Between two timesteps the windows have the noise of the lower one, and the solver that of the nearer one.
        """
        timestep = torch.floor(t * self.num_train_timesteps + _ROUNDING).clamp(1, self.num_train_timesteps)
        return torch.minimum(t, timestep / self.num_train_timesteps)

    def solver_windows(self, steps_per_window: int) -> int | None:
        """The solver's `num_windows`: its stride as published where that ends at the windows' ends, else None."""
        divides = self.num_train_timesteps % (self.num_windows * steps_per_window) == 0
        return self.num_windows if self.config.window_boundaries is None and divides else None


@dataclass(frozen=True, kw_only=True)
class WindowPairs:
    """Windows that the teacher solved, one a row."""

    z_start: Tensor  # where the window starts, (batch, channels, height, width) float32
    z_end: Tensor  # where the teacher ended, of the same shape
    index: Tensor  # number of the window, (batch,) long
    conditioning: Conditioning  # what the teacher was given for the prompts
    uniform: Tensor  # numbers (batch,) in [0, 1) that decide the training times


class StepLoss(NamedTuple):
    """What one micro-step gives; all tensors stay on the device."""

    loss: Tensor  # the weighted mean, a scalar with its graph
    window_sums: Tensor  # sum of the unweighted row losses of each window, (windows,)
    window_counts: Tensor  # rows of each window, (windows,)


def cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """The conditions in a type; time ids, which half precision would round, stay as they are."""
    return Conditioning(
        prompt_embeds=conditioning.prompt_embeds.to(dtype),
        added={name: value if name == "time_ids" else value.to(dtype) for name, value in conditioning.added.items()},
    )


def predict(student: UNet, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The student's output (batch, channels, height, width) at `timestep` (batch,), which is t T."""
    return student(sample, timestep, **cast(conditioning, sample.dtype).unet_kwargs(), return_dict=False)[0]


def distillation_step(student: UNet, pairs: WindowPairs, geometry: WindowGeometry, loss: LossConfig) -> StepLoss:
    """The student's loss at a time of each window, on the line between what the teacher made of it."""
    window = geometry.rows(pairs.index)
    t = geometry.times(window, pairs.uniform)
    kind, timesteps = geometry.config.prediction_type, geometry.num_train_timesteps
    example = make_student_example(pairs.z_start, pairs.z_end, t, window, kind, num_train_timesteps=timesteps)
    output = predict(student, example.sample, example.timestep, pairs.conditioning)
    rows = row_losses(output, example.target, loss)
    weights = row_weights(window, pairs.index, t, kind, loss)
    zeros = torch.zeros(geometry.num_windows, device=rows.device)
    return StepLoss(
        loss=(rows * weights).mean(),
        window_sums=zeros.index_add(0, pairs.index, rows.detach()),
        window_counts=zeros.index_add(0, pairs.index, torch.ones_like(rows)),
    )


def row_losses(output: Tensor, target: Tensor, loss: LossConfig) -> Tensor:
    """The mean loss of each row, (batch,) float32, not weighted."""
    output, target = output.float(), target.float()
    match loss.kind:
        case "l2":
            errors = (output - target).square()
        case "huber":
            errors = huber_loss(output, target, reduction="none", delta=loss.huber_c)
    return errors.flatten(1).mean(1)


def row_weights(window: WindowAlpha, index: Tensor, t: Tensor, prediction_type: str, loss: LossConfig) -> Tensor:
    """What each row counts, (batch,) float32: of its window, that window's `index`, and the time t that was asked."""
    match loss.weighting:
        case "none":
            return torch.ones_like(t)
        case "reciprocal":
            return 1.0 / (1.0 - t).clamp(min=RECIPROCAL_FLOOR) / _RECIPROCAL_MEAN
        case "endpoint":
            return endpoint_weight(window, prediction_type, maximum=loss.max_weight)
        case "window":
            return torch.tensor(loss.window_weights, dtype=torch.float32).to(t.device, non_blocking=True)[index]
