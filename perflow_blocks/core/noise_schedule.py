"""Discrete noise schedules, and how continuous time reads them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_TRAIN_TIMESTEPS = 1_000_000
"""Far more than any model has. A larger number from a file would fill the memory."""

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# In timesteps: far below one step, far above the rounding of t*T in float32 (1e-4 at T = 1000).
_ROUNDING = 1e-3


def require_positive_int(name: str, value: object) -> int:
    """The value as an int. A ValueError names it if it is not an integer of at least 1 (a bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer.")
    return int(value)


def make_alphas_cumprod(
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
    trained_betas: Sequence[float] | None = None,
) -> Tensor:
    """The cumulative products abar of `1 - beta`, float64 of shape (num_train_timesteps,), descending within (0, 1).

    `scaled_linear` is linear in the square root of beta (latent diffusion, arXiv 2112.10752), `squaredcos_cap_v2` the
    cosine schedule of arXiv 2102.09672 with beta capped at 0.999. `trained_betas` replaces all of these.

    Raises:
        ValueError: an unknown schedule, more than `MAX_TRAIN_TIMESTEPS` timesteps, or betas that are not
            `num_train_timesteps` numbers within (0, 1).
    """
    if require_positive_int("num_train_timesteps", num_train_timesteps) > MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"{num_train_timesteps=} must be at most {MAX_TRAIN_TIMESTEPS}.")
    if trained_betas is not None:
        betas = torch.as_tensor(trained_betas, dtype=torch.float64).flatten()
        if len(betas) != num_train_timesteps:
            raise ValueError(f"trained_betas must have {num_train_timesteps=} values, but has {len(betas)}.")
    else:
        match beta_schedule:
            case "linear":
                betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
            case "scaled_linear":
                # A negative beta makes a nan here, which the range check below refuses.
                first, last = torch.tensor([beta_start, beta_end], dtype=torch.float64).sqrt().tolist()
                betas = torch.linspace(first, last, num_train_timesteps, dtype=torch.float64) ** 2
            case "squaredcos_cap_v2":
                phase = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
                level = torch.cos((phase + 0.008) / 1.008 * (math.pi / 2)) ** 2
                betas = (1.0 - level[1:] / level[:-1]).clamp(max=0.999)
            case _:
                raise ValueError(f"beta_schedule={beta_schedule!r} must be one of {', '.join(BETA_SCHEDULES)}.")
    if not bool(((betas > 0) & (betas < 1)).all()):
        given = f"betas from {betas.min():.3g} to {betas.max():.3g}"
        raise ValueError(f"{given} must be within (0, 1); check beta_start, beta_end and trained_betas.")
    return torch.cumprod(1.0 - betas, dim=0)


def alpha_at(alphas_cumprod: Tensor, t: float) -> float:
    """abar at a continuous time, read from a table (T,) on the host.

    The index is `max(int(t * T) - 1, 0)`: t = 1 reads T - 1, and t = 0 reads 0. Above t = 1 it stays T - 1.
    """
    index = math.floor(t * len(alphas_cumprod) + _ROUNDING) - 1
    return float(alphas_cumprod[min(max(index, 0), len(alphas_cumprod) - 1)])
