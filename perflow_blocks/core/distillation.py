"""What the student is trained towards: a point on a window's chord, the output wanted there, and what errors weigh.

Piecewise rectified flow (arXiv 2405.07510) replaces the teacher's solve from z_s to z_e by the straight line between
them. Windows' numbers and times may be tensors (batch,): one for each row of the latents (batch, ...).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .parameterization import Scalar, WindowAlpha, chord_coefficients, window_coefficients
from .step_plan import apply_step


class StudentExample(NamedTuple):
    """One batch for the student."""

    sample: Tensor  # z_t on the chord, (batch, channels, height, width)
    timestep: Tensor  # what the UNet is given, t * T, (batch,) float32
    target: Tensor  # the output that leads from z_s to z_e, of the sample's shape


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

    z_start and z_end, (batch, channels, height, width), are the ends that the teacher solved.
    """
    return StudentExample(
        sample=chord(z_start, z_end, t, window.start, window.end),
        timestep=t * num_train_timesteps,
        target=student_output(z_start, z_end, window, prediction_type),
    )


def marginal(x0: Tensor, noise: Tensor, alpha: Scalar) -> Tensor:
    """The diffusion marginal sqrt(abar) x0 + sqrt(1 - abar) noise."""
    return apply_step(x0, noise, alpha**0.5, (1.0 - alpha) ** 0.5)


def chord(z_start: Tensor, z_end: Tensor, t: Scalar, start: Scalar, end: Scalar) -> Tensor:
    """z_t on the straight line from z_start (at time `start`) to z_end (at time `end`)."""
    weight = (t - start) / (end - start)
    return apply_step(z_start, z_end, 1.0 - weight, weight)


def window_endpoint(
    sample: Tensor, output: Tensor, window: WindowAlpha, prediction_type: str, t: Scalar | None = None
) -> Tensor:
    """z_e from z_t = `sample` and the network's output there; t defaults to the window's start."""
    at = window.start if t is None else t
    return apply_step(sample, output, *chord_coefficients(window, at, prediction_type))


def student_output(z_start: Tensor, z_end: Tensor, window: WindowAlpha, prediction_type: str) -> Tensor:
    """The output that leads from z_start exactly to z_end: the training target, and the inverse of the endpoint."""
    lam, eta = window_coefficients(window, prediction_type)
    return apply_step(z_end, z_start, 1.0 / eta, -lam / eta)


def endpoint_weight(window: WindowAlpha, prediction_type: str, *, maximum: float) -> Tensor:
    """Weights (batch,) that turn an error of the output into an error of the image at the window's end.

    An output error d moves the endpoint by eta d, and so the image in it by eta d / sqrt(abar_end): the weight is
    eta^2 / abar_end. Without it the first window, where eta is largest, hardly learns the image's content.
    """
    _, eta = window_coefficients(window, prediction_type)
    return torch.as_tensor(eta**2 / window.alpha_end).clamp(max=maximum)


def draw_times(window: WindowAlpha, uniform: Tensor, *, start_share: float = 0.0) -> Tensor:
    """Times (batch,) in (end, start] of each row's window from numbers (batch,) uniform in [0, 1).

    The share `start_share` of the numbers gives the window's start itself, which is where a sampler with one step per
    window asks the student; the rest spreads evenly.
    """
    spread = ((uniform - start_share) / (1.0 - start_share)).clamp(min=0.0)
    return window.start + spread * (window.end - window.start)
