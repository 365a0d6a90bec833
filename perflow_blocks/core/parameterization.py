"""What a PeRFlow network predicts, and the straight line it implies (arXiv 2405.07510), as coefficients.

Inside a window from s (start) to e (end) the path is the chord z_t = z_s + (t - s)/(e - s) (z_e - z_s). Every
prediction type gives the window's end as one linear map of its start and the network's output,

    z_e = lam z_s + eta output,

and differs only in (lam, eta); the rest is algebra on that line. With abar the cumulative alphas:

    ddim_eps  output = eps:  lam = sqrt(abar_e/abar_s),  eta = sqrt(1 - abar_e) - lam sqrt(1 - abar_s)
    diff_eps  output = eps:  gamma = sqrt(abar_s/abar_e),  lam = 1/gamma,  eta = -sqrt(1 - gamma^2)/gamma
    velocity  output = dz/dt:  lam = 1,  eta = e - s

Coefficients are numbers, or tensors of one shape; `core.step_plan.apply_step` applies a pair of them to latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .noise_schedule import alpha_at
from .windows import TimeWindows

PredictionType = Literal["ddim_eps", "diff_eps", "velocity"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

Scalar = float | Tensor


class WindowAlpha(NamedTuple):
    """A window as the formulas need it: numbers, or tensors of one shape with one entry per time asked for."""

    start: Scalar  # continuous time in [0, 1]
    end: Scalar
    gamma: Scalar  # sqrt(alpha_start / alpha_end), in (0, 1)
    alpha_start: Scalar  # abar at the start
    alpha_end: Scalar


def window_table(
    windows: TimeWindows, alphas_cumprod: Tensor, *, final_alpha_cumprod: float | None = None
) -> tuple[WindowAlpha, ...]:
    """Every window, noisiest first, as numbers read once from abar (float64, on the host).

    `final_alpha_cumprod` is abar at t = 0, by default `alphas_cumprod[0]`.
    """
    alphas = [alpha_at(alphas_cumprod, boundary) for boundary in windows.boundaries]
    if final_alpha_cumprod is not None and windows.boundaries[-1] == 0.0:
        alphas[-1] = final_alpha_cumprod
    edges = itertools.pairwise(zip(windows.boundaries, alphas, strict=True))
    return tuple(
        WindowAlpha(start, end, (alpha_start / alpha_end) ** 0.5, alpha_start, alpha_end)
        for (start, alpha_start), (end, alpha_end) in edges
    )


def window_alpha(windows: TimeWindows, rows: Sequence[WindowAlpha], t: Scalar) -> WindowAlpha:
    """The row of `window_table` for a continuous time t.

    Numbers for a number; for a floating tensor, tensors of its shape and device, in float32 or better. An integer
    tensor, which would be a timestep rather than a time, is a ValueError.
    """
    if not isinstance(t, Tensor):
        return rows[windows.index(t)]
    if not t.is_floating_point():
        raise ValueError(f"t must be floating times in [0, 1] (timestep / num_train_timesteps), not {t.dtype}.")
    table = torch.tensor(rows, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
    return WindowAlpha(*table[windows.index(t)].unbind(-1))


def window_coefficients(window: WindowAlpha, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(lam, eta) of `z_e = lam z_s + eta output`. An unknown prediction type is a ValueError."""
    start, end, _, alpha_start, alpha_end = window
    match prediction_type:
        case "ddim_eps":
            return ddim_coefficients(alpha_start, alpha_end)
        case "diff_eps":
            ratio = alpha_start / alpha_end
            return ratio**-0.5, -((1.0 / ratio - 1.0) ** 0.5)  # sqrt(1 - gamma^2)/gamma = sqrt(1/gamma^2 - 1)
        case "velocity":
            return 1.0, end - start
        case _:
            raise ValueError(f"prediction_type={prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}.")


def ddim_coefficients(alpha: Scalar, alpha_next: Scalar) -> tuple[Scalar, Scalar]:
    """(a, b) of the deterministic DDIM step `z_next = a z + b eps` between two abar (arXiv 2010.02502, eq. 12)."""
    a = (alpha_next / alpha) ** 0.5
    return a, (1.0 - alpha_next) ** 0.5 - a * (1.0 - alpha) ** 0.5


def chord_coefficients(window: WindowAlpha, t: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(lam_t, eta_t) of `z_e = lam_t z_t + eta_t output` for a time t in the window: z_s eliminated from the chord."""
    start, end = window.start, window.end
    lam, eta = window_coefficients(window, prediction_type)
    denominator = lam * (t - start) + (end - t)
    return lam * (end - start) / denominator, eta * (end - t) / denominator


def x0_coefficients(window: WindowAlpha, t: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(c, d) of `x0 = c z_t + d output`.

    The chord through z_t gives z_s and z_e. Both are marginals of one (x0, eps), which two equations determine. For
    `ddim_eps` this is the familiar x0 = (z_e - sqrt(1 - abar_e) eps)/sqrt(abar_e).
    """
    lam, eta = window_coefficients(window, prediction_type)
    lam_t, eta_t = chord_coefficients(window, t, prediction_type)
    sigma_start, sigma_end = (1.0 - window.alpha_start) ** 0.5, (1.0 - window.alpha_end) ** 0.5
    determinant = window.alpha_start**0.5 * sigma_end - window.alpha_end**0.5 * sigma_start
    # z_s = (z_e - eta output)/lam, then x0 = (sigma_e z_s - sigma_s z_e)/determinant.
    weight_end = (sigma_end / lam - sigma_start) / determinant
    return weight_end * lam_t, weight_end * eta_t - sigma_end * eta / (lam * determinant)


def chord_marginal_coefficients(window: WindowAlpha, t: Scalar) -> tuple[Scalar, Scalar]:
    """(p, q) of `z_t = p x0 + q noise` on the chord between the marginals of one (x0, noise) at the window's ends.

    This is the student's path. Strictly inside a window it differs from the marginal at t.
    """
    weight = (t - window.start) / (window.end - window.start)
    signal = (1.0 - weight) * window.alpha_start**0.5 + weight * window.alpha_end**0.5
    sigma = (1.0 - weight) * (1.0 - window.alpha_start) ** 0.5 + weight * (1.0 - window.alpha_end) ** 0.5
    return signal, sigma
