"""What the student is trained towards: a point on a window's chord and the output wanted there; and what errors weigh.

Piecewise rectified flow (arXiv 2405.07510): the teacher's solve from z_s to z_e is replaced by the straight line
between them, and the student learns, at every time of the window, the output that leads along that line.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parameterization import WindowAlpha, chord, student_output, window_coefficients


@dataclass(frozen=True, kw_only=True)
class StudentExample:
    """One batch for the student.

    Attributes:
        sample: z_t on the chord, (batch, channels, height, width).
        timestep: what the UNet is given, t * T, (batch,) float32.
        target: the output that leads from z_s to z_e, of the sample's shape.
    """

    sample: Tensor
    timestep: Tensor
    target: Tensor


def make_student_example(
    z_start: Tensor,
    z_end: Tensor,
    t: Tensor,
    window: WindowAlpha,
    prediction_type: str,
    *,
    num_train_timesteps: int = 1000,
) -> StudentExample:
    """The training example at times t (batch,) in the windows `window` (tensors of shape (batch,)).

    The window's ends are what the teacher solved: z_start (batch, channels, height, width), and z_end likewise.
    """
    return StudentExample(
        sample=chord(z_start, z_end, t, window.start, window.end),
        timestep=t * num_train_timesteps,
        target=student_output(z_start, z_end, window, prediction_type),
    )


def endpoint_weight(window: WindowAlpha, prediction_type: str, *, maximum: float) -> Tensor:
    """Weights (batch,) that turn an error of the output into an error of the picture at the window's end.

    An output error d moves the endpoint by eta d, and so the picture in it by eta d / sqrt(abar_end): the weight is
    eta^2 / abar_end. Without it the first window, where eta is largest, learns the picture's content hardly at all.
    `velocity` outputs are weighted alike, with eta = end - start.
    """
    _, eta = window_coefficients(
        window.alpha_start, window.alpha_end, prediction_type, start=window.start, end=window.end
    )
    return torch.as_tensor(eta**2 / window.alpha_end).clamp(max=maximum)


def draw_times(window: WindowAlpha, uniform: Tensor, *, start_share: float = 0.0) -> Tensor:
    """Times (batch,) in (end, start] of each row's window from numbers (batch,) uniform in [0, 1).

    The share `start_share` of the numbers gives the window's start itself, which is where a sampler with one step per
    window asks the student; the rest spreads evenly.
    """
    spread = ((uniform - start_share) / (1.0 - start_share)).clamp(min=0.0)
    return window.start + spread * (window.end - window.start)
