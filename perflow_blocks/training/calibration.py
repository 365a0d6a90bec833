"""Fits a scheduler's theta, the relative corrections of its steps, to the images of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

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
    **teacher_settings: Any,
) -> Tensor:
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
        teacher_settings: of the teacher's calls, such as `guidance_scale=3.0`; `num_inference_steps` is by default 50.

    Returns:
        Theta (num_time_windows, 2), float64, for `PeRFlowScheduler(theta=...)` or `pipe.update_components(theta=...)`.

    Raises:
        ValueError: no prompts, iterations below 1, or latents that are not finite.
    """
    if not prompts or iterations < 1:
        raise ValueError(f"{len(prompts)} prompts and {iterations=} must both be at least 1.")
    generator, batches = torch.Generator().manual_seed(seed), list[tuple[dict[str, Any], Tensor]]()
    settings: Any = {"num_inference_steps": 50, **teacher_settings, "output_type": "latent"}
    side, channels = teacher.unet.config.sample_size, teacher.unet.config.in_channels
    for first in range(0, len(prompts), batch_size):
        chunk = list(prompts[first : first + batch_size])
        noise = torch.randn(len(chunk), channels, side, side, generator=generator)
        call = {"prompt": chunk, "latents": noise.to(teacher.unet.device, teacher.unet.dtype)}
        batches.append((call, teacher(**call, **settings).images.double().cpu()))

    def draw(call: dict[str, Any]) -> Tensor:
        return pipe(**call, num_inference_steps=steps, output_type="latent").images.double().cpu()

    draw(batches[0][0])  # the first call puts the scheduler in place
    before = pipe.scheduler.config.theta
    try:
        return _fit(pipe.scheduler, draw, batches, iterations)
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
