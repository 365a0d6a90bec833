"""How an image is noised to the times of a plan: on the student's path, or to the diffusion marginal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise_schedule import alpha_at
from .parameterization import WindowAlpha, chord_marginal_coefficients
from .step_plan import StepPlan

NOISINGS = ("chord", "marginal")


def noise_coefficients(
    plan: StepPlan, rows: Sequence[WindowAlpha], alphas_cumprod: Tensor, *, noising: str = "chord"
) -> Tensor:
    """(P, Q) of `z = P x0 + Q noise` where each step of a plan starts and where the last one ends.

    `chord` is the straight line between the marginals at a window's ends, which is the student's path; `marginal` is
    the diffusion marginal at the time itself. They agree at window boundaries. At the end of the last window the image
    stays as it is: (1, 0).

    `rows` are those of the plan's windows, from `window_table`; abar (num_train_timesteps,) is float64 on the host.
    So is the result, (len(plan) + 1, 2). An unknown `noising` is a ValueError.
    """
    if noising not in NOISINGS:
        raise ValueError(f"noising={noising!r} must be one of {', '.join(NOISINGS)}.")
    times = (*plan.times, plan.next_times[-1])
    windows = (rows[k] for k in (*plan.window_index, plan.window_index[-1]))
    pairs: list[tuple[float, float]] = []
    for t, window in zip(times, windows, strict=True):
        if t <= rows[-1].end:
            pairs.append((1.0, 0.0))
        elif noising == "chord":
            signal, sigma = chord_marginal_coefficients(window, t)
            pairs.append((float(signal), float(sigma)))
        else:
            alpha = alpha_at(alphas_cumprod, t)
            pairs.append((alpha**0.5, (1.0 - alpha) ** 0.5))
    return torch.tensor(pairs, dtype=torch.float64)
