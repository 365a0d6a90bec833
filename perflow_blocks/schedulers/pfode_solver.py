"""The teacher of the distillation: deterministic DDIM across one time window, each row of the batch in its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.utils import logging
from torch import Tensor

from ..core.ddim import TEACHER_PREDICTION_TYPES, ddim_coefficients
from ..core.parameterization import weighted_sum
from ..core.windows import require_positive_int
from .conditioning import Conditioning, sdxl_conditioning, sdxl_time_ids

logger = logging.get_logger(__name__)

UNet = Callable[..., Any]
"""Called as `unet(latents, timesteps, encoder_hidden_states=..., [added_cond_kwargs=...], return_dict=False)[0]`."""


class PFODESolver:
    """Solves the teacher's probability-flow ODE from the start of a time window to its end (arXiv 2405.07510, sec. 3).

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod` whose `config.prediction_type` is `epsilon` or
            `v_prediction`. Where it has a `final_alpha_cumprod`, that stands for abar below the first timestep.

    Raises:
        ValueError: the scheduler has no alphas, or predicts something else.
    """

    def __init__(self, scheduler: Any) -> None:
        name = type(scheduler).__name__
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        if alphas_cumprod is None:
            raise ValueError(f"{name} has no alphas_cumprod; pass a diffusion scheduler such as DDIMScheduler.")
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in TEACHER_PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={self.prediction_type!r} of {name} is no teacher type; pass a scheduler with one of "
                f"{', '.join(TEACHER_PREDICTION_TYPES)}."
            )
        self.num_train_timesteps = len(alphas_cumprod)
        final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", alphas_cumprod[0])).reshape(1)
        # Shifted by one, so that the index -1 (below the first timestep) has an entry as well.
        self._alphas = torch.cat([final.float(), alphas_cumprod.float().to(final.device)])
        self._guiders: dict[float, ClassifierFreeGuidance] = {}
        self._uneven_logged: set[int] = set()

    def solve(
        self,
        latents: Tensor,
        unet: UNet,
        t_start: float | Tensor,
        t_end: float | Tensor,
        *,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
        num_steps: int = 2,
        num_windows: int | None = 1,
    ) -> Tensor:
        """The latents at `t_end` that `num_steps` DDIM steps (eta = 0) reach from `latents` at `t_start`.

        Args:
            latents: (batch, channels, height, width) at t_start; float32 is advised whatever the UNet's type.
            unet: the frozen teacher. It gets latents in the type of `prompt_embeds` and is called once per step, with
                conditional and unconditional rows in one batch under guidance.
            t_start: continuous time in (0, 1] where the rows start: one for all, or (batch,).
            t_end: continuous time in [0, 1), below t_start: one for all, or (batch,).
            prompt_embeds: (batch, tokens, width).
            negative_prompt_embeds: (batch, tokens, width), needed when `guidance_scale` is above 1.
            guidance_scale: classifier-free guidance of the teacher, at least 1; 1 is none.
            num_steps: DDIM steps, at least 1.
            num_windows: number K of equal windows: each step goes down `T // (K num_steps)` timesteps, as published.
                None lets each row's own t_start and t_end decide, for windows of unequal lengths.

        Returns:
            (batch, channels, height, width), of the latents' type.

        Raises:
            ValueError: inputs that do not fit together, or steps shorter than one timestep.
        """
        positive = Conditioning(prompt_embeds=prompt_embeds)
        negative = None if negative_prompt_embeds is None else Conditioning(prompt_embeds=negative_prompt_embeds)
        return self.solve_conditioned(
            latents,
            unet,
            t_start,
            t_end,
            positive,
            negative,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            num_windows=num_windows,
        )

    @torch.no_grad()
    def solve_conditioned(
        self,
        latents: Tensor,
        unet: UNet,
        t_start: float | Tensor,
        t_end: float | Tensor,
        positive: Conditioning,
        negative: Conditioning | None = None,
        *,
        guidance_scale: float = 1.0,
        num_steps: int = 2,
        num_windows: int | None = 1,
    ) -> Tensor:
        """As `solve`, for the conditions of any family: those of the prompts, and of the empty one for guidance."""
        _check_conditions(len(latents), positive, negative, guidance_scale)
        start, end = _rows("t_start", t_start, latents), _rows("t_end", t_end, latents)
        _check_times(t_start, t_end)
        stride = self._stride(num_steps, num_windows)
        guided = negative is not None and guidance_scale > 1.0
        conditions = positive.join(negative) if negative is not None and guided else positive
        guider = self._guider(guidance_scale) if guided else None
        alphas = self._alphas.to(latents.device)
        for k in range(num_steps):
            index = self._index(start + (end - start) * (k / num_steps))
            if stride is None:
                following = self._index(start + (end - start) * ((k + 1) / num_steps))
            else:
                following = index - stride
            index = index.clamp(0, self.num_train_timesteps - 1)
            output = _predict(unet, latents, index, conditions, guider)
            a, b = ddim_coefficients(alphas[index + 1], alphas[following.clamp(min=-1) + 1], self.prediction_type)
            latents = weighted_sum(latents, output, a, b)
        return latents

    def _guider(self, guidance_scale: float) -> ClassifierFreeGuidance:
        # Kept, because diffusers logs a notice about guiders at every construction.
        if guidance_scale not in self._guiders:
            self._guiders[guidance_scale] = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        return self._guiders[guidance_scale]

    def _index(self, t: Tensor) -> Tensor:
        """The teacher's timestep of a continuous time: t = 1 is T - 1, and t = 0 is -1, below the first."""
        # (T - 1) + (t - 1) T, by an elementwise division in float32: times half-way between two timesteps then fall to
        # the same side as in the published implementation.
        offset = (t - 1.0) / torch.full_like(t, 1.0 / self.num_train_timesteps)
        return torch.round((self.num_train_timesteps - 1) + offset).long()

    def _stride(self, num_steps: int, num_windows: int | None) -> int | None:
        """Timesteps per DDIM step, or None where each row's own window decides."""
        require_positive_int("num_steps", num_steps)
        if num_windows is None:
            return None
        count = require_positive_int("num_windows", num_windows) * num_steps
        stride, rest = divmod(self.num_train_timesteps, count)
        if stride == 0:
            raise ValueError(
                f"num_windows={num_windows} times num_steps={num_steps} exceeds the {self.num_train_timesteps} "
                "training timesteps; pass fewer steps or windows."
            )
        if rest and count not in self._uneven_logged:
            self._uneven_logged.add(count)
            logger.warning(
                "num_windows * num_steps = %d does not divide the %d training timesteps, so that steps of %d "
                "timesteps miss t_end; choose numbers that divide it, or num_windows=None.",
                count,
                self.num_train_timesteps,
                stride,
            )
        return stride


class PFODESolverSDXL(PFODESolver):
    """`PFODESolver` with SDXL's added conditions: pooled embeddings and time ids."""

    def solve(  # type: ignore[override]
        self,
        latents: Tensor,
        unet: UNet,
        t_start: float | Tensor,
        t_end: float | Tensor,
        *,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        resolution: int = 1024,
        add_time_ids: Tensor | None = None,
        guidance_scale: float = 1.0,
        num_steps: int = 2,
        num_windows: int | None = 1,
    ) -> Tensor:
        """As `PFODESolver.solve`, with SDXL's conditions.

        Args:
            pooled_prompt_embeds: (batch, pooled width).
            negative_pooled_prompt_embeds: (batch, pooled width), needed when `guidance_scale` is above 1.
            resolution: pixels of the square pictures; the time ids are then (resolution, resolution, 0, 0, resolution,
                resolution), that is original size, no crop, target size.
            add_time_ids: time ids to use instead, (6,), (1, 6) or (batch, 6), for both prompts.
        """
        time_ids = sdxl_time_ids(resolution, add_time_ids, prompt_embeds)
        positive = sdxl_conditioning(prompt_embeds, pooled_prompt_embeds, time_ids)
        negative = None
        if negative_prompt_embeds is not None and negative_pooled_prompt_embeds is not None:
            negative = sdxl_conditioning(negative_prompt_embeds, negative_pooled_prompt_embeds, time_ids)
        return self.solve_conditioned(
            latents,
            unet,
            t_start,
            t_end,
            positive,
            negative,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            num_windows=num_windows,
        )


def _predict(
    unet: UNet, latents: Tensor, index: Tensor, conditions: Conditioning, guider: ClassifierFreeGuidance | None
) -> Tensor:
    """The teacher's prediction (batch, ...) from one call; under guidance `conditions` holds 2 batch rows."""
    repeats = 1 if guider is None else 2
    model_input = torch.cat([latents.to(conditions.prompt_embeds.dtype)] * repeats)
    output = unet(model_input, torch.cat([index] * repeats), **conditions.unet_kwargs(), return_dict=False)[0]
    if guider is None:
        return output
    pred_cond, pred_uncond = output.chunk(2)
    return guider.forward(pred_cond, pred_uncond).pred


def _check_conditions(
    batch: int, positive: Conditioning, negative: Conditioning | None, guidance_scale: float
) -> None:
    if not math.isfinite(guidance_scale) or guidance_scale < 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} is no number of at least 1; pass 1.0 for no guidance.")
    if guidance_scale > 1.0 and negative is None:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs the negative prompt; pass negative_prompt_embeds (and, for SDXL, "
            "negative_pooled_prompt_embeds) or guidance_scale=1.0."
        )
    positive.check_rows(batch)
    if negative is None:
        return
    negative.check_rows(batch, "negative_")
    if negative.prompt_embeds.shape != positive.prompt_embeds.shape:
        raise ValueError(
            f"negative_prompt_embeds {tuple(negative.prompt_embeds.shape)} and prompt_embeds "
            f"{tuple(positive.prompt_embeds.shape)} differ in shape; encode both to the same length."
        )


def _rows(name: str, t: float | Tensor, latents: Tensor) -> Tensor:
    """The time of each row, float32 of shape (batch,) on the latents' device."""
    rows = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    if rows.ndim > 1 or (rows.ndim == 1 and len(rows) not in (1, len(latents))):
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)} for {len(latents)} latents; pass one time, or one per latent."
        )
    return rows.expand(len(latents))


def _check_times(t_start: float | Tensor, t_end: float | Tensor) -> None:
    """Checks times that lie on the host; reading a tensor back from a device would stall it."""
    if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in (t_start, t_end)):
        return
    start, end = torch.as_tensor(t_start), torch.as_tensor(t_end)
    if not bool(((0.0 <= end) & (end < start) & (start <= 1.0)).all()):
        raise ValueError(
            f"t_start={t_start} and t_end={t_end} are not times with 0 <= t_end < t_start <= 1 in every row; "
            "pass continuous times, from noise (1) to data (0)."
        )
