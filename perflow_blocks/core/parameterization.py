"""What a PeRFlow network predicts, and the straight line it implies (arXiv 2405.07510).

Inside a window from s (start) to e (end) the path is the chord z_t = z_s + (t - s)/(e - s) (z_e - z_s). Every
prediction type gives the window's end as one linear map of its start and the network's output,

    z_e = lam z_s + eta output,

and differs only in (lam, eta); all that follows is algebra on that line. With abar the cumulative alphas:

    ddim_eps  output = eps:  lam = sqrt(abar_e/abar_s),  eta = sqrt(1 - abar_e) - lam sqrt(1 - abar_s)
    diff_eps  output = eps:  gamma = sqrt(abar_s/abar_e),  lam = 1/gamma,  eta = -sqrt(1 - gamma^2)/gamma
    velocity  output = dz/dt:  lam = 1,  eta = e - s

Coefficients may be numbers or tensors. A tensor of shape (batch,) counts per row of the sample; any other must
broadcast against it. Sums are formed in float32 or better and returned in the first sample's type.
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
    """A window as the formulas need it: numbers, or tensors of one shape with one entry per time asked for.

    `start` and `end` are continuous times in [0, 1]; `alpha_start` and `alpha_end` are abar there; `gamma` is
    sqrt(alpha_start / alpha_end), in (0, 1).
    """

    start: Scalar
    end: Scalar
    gamma: Scalar
    alpha_start: Scalar
    alpha_end: Scalar


def window_table(
    windows: TimeWindows, alphas_cumprod: Tensor, *, final_alpha_cumprod: float | None = None
) -> tuple[WindowAlpha, ...]:
    """Every window, noisiest first, as numbers read once from abar (float64, on the host).

    `final_alpha_cumprod` stands for abar at t = 0 where it is given; otherwise that is `alphas_cumprod[0]`.
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

    Numbers for a number; for a floating tensor, tensors of its shape and device, in float32 or better.

    Raises:
        ValueError: t is an integer tensor, so a timestep rather than a time.
    """
    if not isinstance(t, Tensor):
        return rows[windows.index(t)]
    if not t.is_floating_point():
        raise ValueError(f"t has dtype {t.dtype}; pass floating times in [0, 1], timestep / num_train_timesteps.")
    table = torch.tensor(rows, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device)
    return WindowAlpha(*table[windows.index(t)].unbind(-1))


def window_coefficients(
    alpha_start: Scalar,
    alpha_end: Scalar,
    prediction_type: str,
    *,
    start: Scalar | None = None,
    end: Scalar | None = None,
) -> tuple[Scalar, Scalar]:
    """(lam, eta) of `z_e = lam z_s + eta output`. `velocity` needs the times `start` and `end`, others ignore them.

    Raises:
        ValueError: an unknown prediction type, or `velocity` without the times.
    """
    match prediction_type:
        case "ddim_eps":
            lam = (alpha_end / alpha_start) ** 0.5
            return lam, (1.0 - alpha_end) ** 0.5 - lam * (1.0 - alpha_start) ** 0.5
        case "diff_eps":
            ratio = alpha_start / alpha_end
            return ratio**-0.5, -((1.0 / ratio - 1.0) ** 0.5)  # sqrt(1 - gamma^2)/gamma = sqrt(1/gamma^2 - 1)
        case "velocity":
            if start is None or end is None:
                raise ValueError("prediction_type='velocity' needs the window's times; pass start= and end=.")
            return 1.0, end - start
        case _:
            raise ValueError(
                f"prediction_type={prediction_type!r} is no PeRFlow type; pass one of {', '.join(PREDICTION_TYPES)}."
            )


def chord_coefficients(window: WindowAlpha, t: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(lam_t, eta_t) of `z_e = lam_t z_t + eta_t output` for a time t in the window: z_s eliminated from the chord."""
    start, end, _, alpha_start, alpha_end = window
    lam, eta = window_coefficients(alpha_start, alpha_end, prediction_type, start=start, end=end)
    denominator = lam * (t - start) + (end - t)
    return lam * (end - start) / denominator, eta * (end - t) / denominator


def x0_coefficients(window: WindowAlpha, t: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(c, d) of `x0 = c z_t + d output`.

    The chord through z_t gives z_s and z_e; both are marginals of one (x0, eps), which two equations determine. For
    `ddim_eps` this is the familiar x0 = (z_e - sqrt(1 - abar_e) eps)/sqrt(abar_e).
    """
    start, end, _, alpha_start, alpha_end = window
    lam, eta = window_coefficients(alpha_start, alpha_end, prediction_type, start=start, end=end)
    lam_t, eta_t = chord_coefficients(window, t, prediction_type)
    sigma_start, sigma_end = (1.0 - alpha_start) ** 0.5, (1.0 - alpha_end) ** 0.5
    determinant = alpha_start**0.5 * sigma_end - alpha_end**0.5 * sigma_start
    # z_s = (z_e - eta output)/lam, then x0 = (sigma_e z_s - sigma_s z_e)/determinant.
    weight_end = (sigma_end / lam - sigma_start) / determinant
    return weight_end * lam_t, weight_end * eta_t - sigma_end * eta / (lam * determinant)


def window_endpoint(
    sample: Tensor, output: Tensor, window: WindowAlpha, prediction_type: str, t: Scalar | None = None
) -> Tensor:
    """z_e from z_t = `sample` (batch, ...) and the network's output there; t defaults to the window's start."""
    at = window.start if t is None else t
    return weighted_sum(sample, output, *chord_coefficients(window, at, prediction_type))


def student_output(z_start: Tensor, z_end: Tensor, window: WindowAlpha, prediction_type: str) -> Tensor:
    """The output that leads from z_start exactly to z_end: the training target, and `window_endpoint`'s inverse."""
    start, end, _, alpha_start, alpha_end = window
    lam, eta = window_coefficients(alpha_start, alpha_end, prediction_type, start=start, end=end)
    return weighted_sum(z_end, z_start, 1.0 / eta, -lam / eta)


def predict_x0(sample: Tensor, output: Tensor, window: WindowAlpha, t: Scalar, prediction_type: str) -> Tensor:
    """The clean sample that z_t = `sample` and the network's output imply, of the sample's shape and type."""
    return weighted_sum(sample, output, *x0_coefficients(window, t, prediction_type))


def chord(z_start: Tensor, z_end: Tensor, t: Scalar, start: Scalar, end: Scalar) -> Tensor:
    """z_t on the straight line from z_start (at time `start`) to z_end (at time `end`)."""
    weight = (t - start) / (end - start)
    return weighted_sum(z_start, z_end, 1.0 - weight, weight)


def marginal(x0: Tensor, noise: Tensor, alpha: Scalar) -> Tensor:
    """The diffusion marginal sqrt(abar) x0 + sqrt(1 - abar) noise."""
    return weighted_sum(x0, noise, alpha**0.5, (1.0 - alpha) ** 0.5)


def chord_marginal(x0: Tensor, noise: Tensor, window: WindowAlpha, t: Scalar) -> Tensor:
    """z_t on the chord between the marginals of one (x0, noise) at the window's two ends.

    Strictly inside a window the student's path is this, not the marginal at t.
    """
    return weighted_sum(x0, noise, *chord_marginal_coefficients(window, t))


def chord_marginal_coefficients(window: WindowAlpha, t: Scalar) -> tuple[Scalar, Scalar]:
    """(p, q) of `z_t = p x0 + q noise` on that chord; at the window's ends sqrt(abar) and sqrt(1 - abar)."""
    weight = (t - window.start) / (window.end - window.start)
    signal = (1.0 - weight) * window.alpha_start**0.5 + weight * window.alpha_end**0.5
    sigma = (1.0 - weight) * (1.0 - window.alpha_start) ** 0.5 + weight * (1.0 - window.alpha_end) ** 0.5
    return signal, sigma


def weighted_sum(x: Tensor, y: Tensor, a: Scalar, b: Scalar) -> Tensor:
    """`a x + b y` in float32 or better, returned in x's type; a (batch,) coefficient counts per row.

    Two kernels and one new tensor; one cast more for half precision.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = torch.broadcast_tensors(x, y)
    total = _scaled(x, a, dtype)
    if isinstance(b, Tensor):
        total.addcmul_(y, _weight(b, y, dtype))
    else:
        total.add_(y, alpha=b)
    return total.to(x.dtype)


def _scaled(x: Tensor, a: Scalar, dtype: torch.dtype) -> Tensor:
    """`a x` in `dtype`, as a new tensor."""
    return x * _weight(a, x, dtype) if isinstance(a, Tensor) else x.to(dtype) * a


def _weight(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A coefficient, one or one per row, with the dimensions of `like`: one of none would not lift half precision."""
    return value.to(dtype).reshape(-1, *(1,) * (like.ndim - 1)) if like.ndim else value.to(dtype)


def per_row(value: Scalar, like: Tensor) -> Scalar:
    """A (batch,) tensor as (batch, 1, ..., 1) with as many dimensions as `like`; anything else unchanged."""
    if isinstance(value, Tensor) and value.ndim == 1 and like.ndim > 1:
        return value.reshape(-1, *(1,) * (like.ndim - 1))
    return value
