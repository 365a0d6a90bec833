"""The windows as tensors: which one a row is in, and at which time it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.distillation import draw_times
from ..core.noise_schedule import make_alphas_cumprod
from ..core.parameterization import WindowAlpha, window_table
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS
from .config import WindowConfig

_ROUNDING = 1e-3  # of a step between two discrete times: far above float32's rounding


class WindowGeometry:
    """The windows of a configuration on a teacher's noise schedule, with the numbers of each on a device.

    Args:
        config: the windows.
        scheduler_config: of the teacher; its betas count.
        device: where the rows are wanted.

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

        Between two timesteps the windows have that of the lower one, and the solver has that of the nearer one.
        """
        timestep = torch.floor(t * self.num_train_timesteps + _ROUNDING).clamp(1, self.num_train_timesteps)
        return torch.minimum(t, timestep / self.num_train_timesteps)

    def solver_windows(self, steps_per_window: int) -> int | None:
        """The solver's `num_windows`: its stride as published where that ends at the windows' ends, else None."""
        divides = self.num_train_timesteps % (self.num_windows * steps_per_window) == 0
        return self.num_windows if self.config.window_boundaries is None and divides else None
