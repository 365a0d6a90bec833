"""PeRFlow's steps (arXiv 2405.07510) on ComfyUI's interface of a model: what denoised it predicts at a noise level.

ComfyUI samples x = sqrt(1 + sigma^2) z, where z are the latents of diffusers' schedulers, and its table of sigmas is
sqrt((1 - abar) / abar) by timestep. From `denoised`, which has guidance in it, the network's output follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perflow_blocks.core.parameterization import PREDICTION_TYPES, window_table
from perflow_blocks.core.step_plan import StepPlan, apply_step, build_step_plan
from perflow_blocks.core.windows import TimeWindows


def perflow_sigmas(table: Tensor, steps: int, num_time_windows: int = 4, denoise: float = 1.0) -> Tensor:
    """The noise level at which each step starts, descending, and 0 at the end: (steps + 1,), fewer with `denoise`.

    Args:
        table: the model's sigmas by timestep, ascending.
        steps: of a whole run; fewer than the windows are raised to one for each.
        num_time_windows: the windows that the weights were distilled for.
        denoise: time in (0, 1] at which an image enters: a first step starts there, then come the steps below it.

    Raises:
        ValueError: `denoise` is outside its range.
    """
    if not 0.0 < denoise <= 1.0:
        raise ValueError(f"denoise={denoise} must be above 0 and at most 1.")
    windows = TimeWindows.equal(num_time_windows, num_train_timesteps=len(table))
    times = windows.distribute_steps(max(steps, num_time_windows))
    timesteps = [round(time * len(table)) for time in times]
    first = max(1, round(denoise * len(table)))
    entered = [first, *(timestep for timestep in timesteps if timestep < first)]
    return torch.cat([table[[timestep - 1 for timestep in entered]], table.new_zeros(1)])


def with_perflow_timesteps(model_sampling: Any) -> Any:
    """A copy of a model's sampling settings that gives the network the timesteps 1 to T, as PeRFlow's training does.

    ComfyUI gives it the index of the noise level, 0 to T - 1: one less.
    """

    class PeRFlowTimesteps(type(model_sampling)):  # type: ignore[misc]
        def timestep(self, sigma: Tensor) -> Tensor:
            return super().timestep(sigma) + 1

    made = copy.copy(model_sampling)
    made.__class__ = PeRFlowTimesteps
    return made


def plan_of(table: Tensor, sigmas: Tensor, prediction_type: str, num_time_windows: int) -> StepPlan:
    """The steps that start at these noise levels, each at the timestep whose sigma is nearest."""
    levels = table.double().cpu()
    starts = sigmas[:-1].double().cpu().log()
    timesteps = (starts[:, None] - levels.log()).abs().argmin(1) + 1
    windows = TimeWindows.equal(num_time_windows, num_train_timesteps=len(levels))
    rows = window_table(windows, 1.0 / (1.0 + levels.square()))
    return build_step_plan(windows, rows, prediction_type, [step / len(levels) for step in timesteps.tolist()])


@torch.no_grad()
def sample_perflow(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    disable: bool | None = None,
    *,
    prediction_type: str = "ddim_eps",
    num_time_windows: int = 4,
) -> Tensor:
    """A sampler of ComfyUI: latents (batch, channels, height, width) at `sigmas[0]` to clean ones.

    Args:
        model: called as `model(x, sigma, **extra_args)`, it gives the denoised latents.
        x, sigmas, extra_args, callback, disable: as ComfyUI passes them to samplers.
        prediction_type: "ddim_eps", "diff_eps", or "velocity" for a model that ComfyUI takes for v-prediction.
        num_time_windows: the windows that the weights were distilled for.

    Raises:
        ValueError: an unknown `prediction_type`, or sigmas that leave out the start of a window.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} must be one of {', '.join(PREDICTION_TYPES)}.")
    table = model.inner_model.inner_model.model_sampling.sigmas
    plan = plan_of(table, sigmas, prediction_type, num_time_windows)
    z, rows = x / (1.0 + sigmas[0] ** 2) ** 0.5, x.new_ones(x.shape[0])
    for i, sigma in enumerate(sigmas[:-1]):
        scale = (1.0 + sigma**2) ** 0.5
        denoised = model(z * scale, sigma * rows, **(extra_args or {}))
        output = (z * scale - denoised) / sigma
        if prediction_type == "velocity":  # v = (x / (sigma^2 + 1) - denoised) sqrt(sigma^2 + 1) / sigma
            output = (z / scale - denoised) * scale / sigma
        if callback is not None:
            callback({"x": z * scale, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        z = apply_step(z, output, plan.sample_coeff[i], plan.output_coeff[i])
    return z
