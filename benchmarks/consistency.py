"""Latent consistency distillation (arXiv 2310.04378), small: what the baseline of `lcm_baseline` is trained by.

The student learns a function f that is the same all along a path of the teacher's ODE, and so its end:

    f(z_t, t) = c_skip(t) z_t + c_out(t) x0(z_t, t),    loss = d(f(z_t, t), f_target(z_prev, t_prev)),

where z_prev is one guided DDIM step of the teacher over k timesteps from z_t, and the target an average of the student
itself. c_skip and c_out are those of diffusers' `LCMScheduler`, which samples it. The guidance scale is fixed, so that
the student needs no embedding of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from perflow_blocks.core.distillation import marginal
from perflow_blocks.core.parameterization import ddim_coefficients
from perflow_blocks.core.step_plan import apply_step
from perflow_blocks.schedulers.pfode_solver import Conditioning
from perflow_blocks.training.pairs import UNet, predict


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """How the baseline is trained.

    Attributes:
        updates: of the student.
        batch_size: rows of an update.
        guidance_scale: of the teacher, baked in; at least 1.
        ddim_steps: of the teacher's grid; a DDIM step skips T / ddim_steps timesteps.
        ema_decay: of the target.
        learning_rate: the highest.
        huber_c: of the pseudo-Huber loss sqrt(d^2 + c^2) - c; 0 for squares.
        max_grad_norm: gradients are clipped to it.
        seed: of data, noise and times.
    """

    updates: int
    batch_size: int = 32
    guidance_scale: float = 3.0
    ddim_steps: int = 50
    ema_decay: float = 0.95
    learning_rate: float = 3e-4
    huber_c: float = 0.001
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def rows_per_update(self) -> int:
        """Rows that go forward through a UNet: the teacher's, twice with guidance, the target's and the student's."""
        return self.batch_size * ((2 if self.guidance_scale > 1 else 1) + 2)


@dataclass(frozen=True, kw_only=True)
class ConsistencyBatch:
    """What an update is made of: clean latents and noise (batch, 4, height, width), and a condition for each."""

    x0: Tensor
    noise: Tensor
    index: Tensor  # (batch,) long, of the point on the DDIM grid, 0 the cleanest
    conditioning: Conditioning
    empty: Conditioning


class ConsistencyLoss:
    """The loss of a student against a target, for a teacher that predicts the noise.

    Args:
        config: guidance, grid and distance.
        scheduler: with the teacher's noise schedule, and c_skip and c_out.
        device: of the batches.
    """

    def __init__(self, config: ConsistencyConfig, scheduler: LCMScheduler, device: torch.device | str = "cpu") -> None:
        self._config = config
        self._scheduler = scheduler
        total = scheduler.config.num_train_timesteps
        self._skip = total // config.ddim_steps
        self._alphas = scheduler.alphas_cumprod.float().to(device)

    def __call__(self, student: UNet, target: UNet, teacher: UNet, batch: ConsistencyBatch) -> Tensor:
        """A scalar in float32."""
        timestep = (batch.index + 1) * self._skip - 1
        previous = (timestep - self._skip).clamp(min=0)
        z = marginal(batch.x0, batch.noise, self._alphas[timestep])
        answer = self.consistency(student, z, timestep, batch.conditioning)
        with torch.no_grad():
            z_previous = self.teacher_step(teacher, z, timestep, previous, batch)
            wanted = self.consistency(target, z_previous, previous, batch.conditioning)
        difference = answer.float() - wanted.float()
        c = self._config.huber_c
        return difference.square().mean() if c == 0 else ((difference.square() + c**2).sqrt() - c).mean()

    def consistency(self, unet: UNet, z: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """f(z, timestep), of z's shape."""
        alpha = self._alphas[timestep]
        eps = predict(unet, z, timestep, conditioning)
        x0 = apply_step(z, eps, alpha**-0.5, -((1.0 / alpha - 1.0) ** 0.5))
        c_skip, c_out = self._scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        return apply_step(z, x0, c_skip, c_out)

    def teacher_step(
        self, teacher: UNet, z: Tensor, timestep: Tensor, previous: Tensor, batch: ConsistencyBatch
    ) -> Tensor:
        """One guided DDIM step (eta = 0) from `timestep` to `previous`."""
        scale = self._config.guidance_scale
        if scale > 1:
            both = batch.conditioning.join(batch.empty)
            eps, empty = predict(teacher, torch.cat([z, z]), torch.cat([timestep, timestep]), both).chunk(2)
            eps = empty + scale * (eps - empty)
        else:
            eps = predict(teacher, z, timestep, batch.conditioning)
        return apply_step(z, eps, *ddim_coefficients(self._alphas[timestep], self._alphas[previous]))


def distill_consistency(
    teacher: Any, student: Any, batches: Iterator[ConsistencyBatch], config: ConsistencyConfig, loss: ConsistencyLoss
) -> Any:
    """Trains the student and returns the average of it that was its target, a UNet in evaluation mode."""
    teacher.eval().requires_grad_(False)
    student.train().requires_grad_(True)
    target = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=max(config.updates, 2), pct_start=0.05
    )
    progress = tqdm(range(config.updates), desc="consistency", unit="update")
    for number in progress:
        value = loss(student, target, teacher, next(batches))
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        target.update_parameters(student)
        if number % 50 == 0:
            progress.set_postfix(loss=f"{value.item():.4f}")
    return target.module.eval()
