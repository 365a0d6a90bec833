"""The time windows of piecewise rectified flow (arXiv 2405.07510) and the steps laid over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise_schedule import require_positive_int

BOUNDARY_TOLERANCE = 0.1
"""In training timesteps: a time this little above a window's end already belongs to the next window."""


@dataclass(frozen=True, kw_only=True)
class TimeWindows:
    """Consecutive windows that tile the continuous time between noise (t = 1) and data (t = 0).

    Window k runs from `boundaries[k]` (its start, noisier) down to `boundaries[k + 1]` (its end, cleaner) and holds
    the times `end < t <= start`. A time within `BOUNDARY_TOLERANCE / num_train_timesteps` above an end counts as that
    end, so that rounding cannot put a boundary in the wrong window. Times outside the windows belong to the first or
    the last.

    `boundaries` are strictly descending times in [0, 1], from noise to data, at least one training timestep apart;
    `num_train_timesteps` is the number of training timesteps that the time 1 stands for. Other
    boundaries are a ValueError.
    """

    boundaries: tuple[float, ...]
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        require_positive_int("num_train_timesteps", self.num_train_timesteps)
        object.__setattr__(self, "boundaries", tuple(float(b) for b in self.boundaries))
        if len(self.boundaries) < 2:
            raise ValueError(f"window_boundaries={self.boundaries} must hold at least two times, such as (1.0, 0.0).")
        if not all(math.isfinite(b) and 0.0 <= b <= 1.0 for b in self.boundaries):
            raise ValueError(f"window_boundaries={self.boundaries} must be times in [0, 1].")
        narrowest = min(start - end for start, end in zip(self.starts, self.ends, strict=True))
        if narrowest * self.num_train_timesteps < 1.0 - 1e-6:
            rule = f"strictly descending, by at least one of {self.num_train_timesteps} timesteps"
            raise ValueError(f"window_boundaries={self.boundaries} must be {rule}.")

    @classmethod
    def equal(
        cls, num_windows: int, *, t_noise: float = 1.0, t_clean: float = 0.0, num_train_timesteps: int = 1000
    ) -> TimeWindows:
        """`num_windows` windows of one width from `t_noise` down to `t_clean`, both in [0, 1]."""
        require_positive_int("num_train_timesteps", num_train_timesteps)
        if require_positive_int("num_windows", num_windows) > num_train_timesteps:  # before so many are made
            raise ValueError(f"num_windows={num_windows} must be at most {num_train_timesteps=}.")
        width = (t_noise - t_clean) / num_windows
        inner = (t_noise - k * width for k in range(num_windows))
        return cls(boundaries=(*inner, t_clean), num_train_timesteps=num_train_timesteps)

    @property
    def num_windows(self) -> int:
        return len(self.boundaries) - 1

    @property
    def starts(self) -> tuple[float, ...]:
        """Where each window begins, noisiest first."""
        return self.boundaries[:-1]

    @property
    def ends(self) -> tuple[float, ...]:
        """Where each window ends, noisiest first; `ends[k] == starts[k + 1]`."""
        return self.boundaries[1:]

    def index(self, t: float | Tensor) -> Any:
        """The window of a time: an int for a number, a LongTensor of the same shape for a tensor (on its device)."""
        slack = BOUNDARY_TOLERANCE / self.num_train_timesteps
        # Comparisons with host numbers: nothing is copied to the device and nothing is read back.
        first = torch.zeros_like(t, dtype=torch.long) if isinstance(t, Tensor) else 0
        return sum((t <= end + slack for end in self.ends[:-1]), first)

    def distribute_steps(self, num_steps: int) -> tuple[float, ...]:
        """The continuous start times of `num_steps` steps, descending.

        Every window gets `num_steps // num_windows` steps and the first `num_steps % num_windows` windows one more.
        Inside a window they are equally spaced from its start, its end excluded. ValueError for fewer than windows.
        """
        require_positive_int("num_steps", num_steps)
        if num_steps < self.num_windows:
            raise ValueError(f"num_steps={num_steps} must be at least num_windows={self.num_windows}.")
        each, extra = divmod(num_steps, self.num_windows)
        times: list[float] = []
        for k, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            count = each + (k < extra)
            times += (start + (end - start) * j / count for j in range(count))
        return tuple(times)


def tile_windows(
    *,
    num_windows: int,
    boundaries: Sequence[float] | None,
    t_noise: float = 1.0,
    t_clean: float = 0.0,
    num_train_timesteps: int = 1000,
) -> TimeWindows:
    """Windows by `boundaries` from `t_noise` to `t_clean` (a ValueError if not), else `num_windows` equal ones."""
    if boundaries is None:
        return TimeWindows.equal(
            num_windows, t_noise=t_noise, t_clean=t_clean, num_train_timesteps=num_train_timesteps
        )
    windows = TimeWindows(boundaries=tuple(boundaries), num_train_timesteps=num_train_timesteps)
    if (windows.boundaries[0], windows.boundaries[-1]) != (t_noise, t_clean):
        raise ValueError(f"window_boundaries={windows.boundaries} must start at {t_noise} and end at {t_clean}.")
    return windows
