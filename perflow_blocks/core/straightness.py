"""How far a path is from a straight line, in each window of piecewise rectified flow (arXiv 2405.07510).

The straightness of rectified flow (arXiv 2209.03003, section 2) over a window from s (start) to e (end),

    S = 1/|e - s| int E ||(z_e - z_s)/(e - s) - dz_t/dt||^2 dt,

is divided here by E ||(z_e - z_s)/(e - s)||^2, so that it has no unit. At 0 one Euler step solves the window exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .distillation import window_endpoint
from .parameterization import WindowAlpha
from .step_plan import apply_step

Predictor = Callable[[Tensor, Tensor], Tensor]
"""Called as `predict(z_t, t)` with z_t (batch, ...) and t (batch,); returns the network's output."""


class Straightness(NamedTuple):
    """For each path, (batch,) float32: mean squared deviation of its velocity from the chord's, and the chord's."""

    deviation: Tensor
    chord: Tensor

    def relative(self) -> Tensor:
        """E deviation / E chord over all paths, a scalar of at least 0: 0 for straight lines."""
        return self.deviation.mean() / self.chord.mean()


def path_straightness(points: Tensor, times: Tensor) -> Straightness:
    """The straightness of polylines with the given points (steps + 1, batch, ...).

    The velocity is constant between two points; their times (steps + 1, batch) are strictly monotonic.
    """
    points, times = points.float().flatten(2), times.float()[..., None]
    spans = times[1:] - times[:-1]
    velocities = (points[1:] - points[:-1]) / spans
    chord = (points[-1] - points[0]) / (times[-1] - times[0])
    deviations = (velocities - chord).square().mean(-1)
    shares = spans[..., 0] / (times[-1] - times[0])[..., 0]
    return Straightness(deviation=(deviations * shares).sum(0), chord=chord.square().mean(-1))


def window_times(window: WindowAlpha, num_steps: int) -> Tensor:
    """The times (num_steps + 1, batch) of equal steps from the windows' starts to their ends, both included."""
    start, end = torch.as_tensor(window.start), torch.as_tensor(window.end)
    shares = torch.arange(num_steps + 1, device=start.device) / num_steps
    times = torch.lerp(start.expand(num_steps + 1, -1), end.expand(num_steps + 1, -1), shares[:, None])
    times[0], times[-1] = start, end
    return times


def student_path(
    predict: Predictor, z_start: Tensor, window: WindowAlpha, prediction_type: str, *, num_steps: int
) -> Tensor:
    """The points (num_steps + 1, batch, ...) that a student passes in equal Euler steps through its windows.

    `z_start` (batch, ...) is where the windows start; `window` holds the numbers of each row as tensors (batch,).
    """
    times = window_times(window, num_steps)
    points = [z_start]
    for t, following in itertools.pairwise(times):
        z_end = window_endpoint(points[-1], predict(points[-1], t), window, prediction_type, t)
        share = (following - t) / (torch.as_tensor(window.end) - t)
        points.append(apply_step(points[-1], z_end, 1.0 - share, share))
    return torch.stack(points)
