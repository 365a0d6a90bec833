"""Fits a scheduler's theta, the relative corrections of its steps, to the images of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..schedulers.scheduling_perflow import is_perflow_scheduler

DIFFERENCE = 0.01  # of theta, for the derivatives by finite differences
DAMPING = 1e-4  # of Levenberg and Marquardt, relative to each parameter's own curvature


@torch.no_grad()
def calibrate_theta(
    pipe: Any,
    teacher: Any,
    prompts: Sequence[str],
    steps: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    iterations: int = 3,
    student_settings: Mapping[str, Any] | None = None,
    **teacher_settings: Any,
) -> list[list[float]]:
    """The theta with which the final latents of a student come nearest to those of its teacher from the same noise.

    Minimises the mean logarithm of each image's squared difference (its PSNR, so that images which turned out to show
    something else do not decide) by Gauss-Newton steps, with derivatives by finite differences. It calls the teacher
    once for each batch of prompts, and the student `iterations * (2 * num_time_windows + 1) + 1` times. Whether the
    result helps is to be measured on other prompts.

    Args:
        pipe: a pipeline with a PeRFlowScheduler, of this package or of diffusers. Its scheduler has other values of
            theta meanwhile, and its own again in the end.
        teacher: a pipeline of diffusers with the base model.
        prompts: at least one; some hundreds are enough, since only two numbers a window are fitted.
        steps: steps of the student.
        seed: of the noise, on the CPU.
        batch_size: prompts of a call.
        iterations: Gauss-Newton steps, at least 1. The best theta of all is returned.
        student_settings: of the student's calls, such as `{"guidance_scale": 1.0}` for a pipeline of diffusers.
        teacher_settings: of the teacher's calls, such as `guidance_scale=3.0`; `num_inference_steps` is by default 50.

    Returns:
        Theta, 2 numbers for each window, for `PeRFlowScheduler(theta=...)` or `pipe.update_components(theta=...)`.

    Raises:
        ValueError: no prompts, numbers below 1, another scheduler, or latents that are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or min(iterations, batch_size) < 1:
        raise ValueError(f"{len(prompts)} prompts, {iterations=} and {batch_size=} must all be at least 1.")
    generator, side = torch.Generator().manual_seed(seed), pipe.unet.config.sample_size
    shape, own = (pipe.unet.config.in_channels, side, side), {"num_inference_steps": steps, **(student_settings or {})}

    def run(one: Any, call: tuple[list[str], Tensor], settings: Any) -> Tensor:
        latents = call[1].to(one.unet.device, one.unet.dtype)
        return one(prompt=call[0], latents=latents, **settings, output_type="latent").images.double().cpu()

    chunks = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    calls = [(chunk, torch.randn(len(chunk), *shape, generator=generator)) for chunk in chunks]
    run(pipe, calls[0], own)  # the first call puts the scheduler in place
    if not is_perflow_scheduler(pipe.scheduler):
        raise ValueError(f"the student's scheduler is {type(pipe.scheduler).__name__}; set a PeRFlowScheduler.")
    batches = [(call, run(teacher, call, {"num_inference_steps": 50, **teacher_settings})) for call in calls]
    before = pipe.scheduler.config.theta
    try:
        return _fit(pipe.scheduler, lambda call: run(pipe, call, own), batches, iterations).tolist()
    finally:
        pipe.scheduler.set_theta(before)


def _fit(scheduler: Any, draw: Callable[[Any], Tensor], batches: list[tuple[Any, Tensor]], iterations: int) -> Tensor:
    theta = torch.zeros(scheduler.windows.num_windows, 2, dtype=torch.float64)
    best, least = theta, float("inf")
    shifts = DIFFERENCE * torch.eye(theta.numel(), dtype=torch.float64)
    for iteration in range(iterations + 1):
        loss, curvature, slope = 0.0, torch.zeros_like(shifts), torch.zeros_like(shifts[0])
        for call, target in batches:
            scheduler.set_theta(theta)
            drawn = draw(call)
            residual = (drawn - target).flatten(1)  # (images, values)
            norms = residual.norm(dim=1, keepdim=True).clamp(min=1e-12)
            loss += float(norms.log().sum())
            if iteration == iterations:
                continue
            columns = []
            for shift in shifts:
                scheduler.set_theta(theta + shift.reshape(theta.shape))
                columns.append(((draw(call) - drawn).flatten(1) / norms).flatten() / DIFFERENCE)
            jacobian = torch.stack(columns, dim=1)
            curvature += jacobian.T @ jacobian
            slope += jacobian.T @ (residual / norms).flatten()
        if not loss < float("inf"):
            raise ValueError("the latents of student or teacher are not finite; use a type of more range.")
        if loss < least:
            best, least = theta, loss
        if iteration < iterations:
            curvature += DAMPING * curvature.diag().diag()
            theta = theta - torch.linalg.solve(curvature, slope).reshape(theta.shape)
    return best
