"""The teacher of the distillation: deterministic DDIM across one time window, each row of the batch in its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.utils import logging
from torch import Tensor

from ..core.parameterization import Scalar, ddim_coefficients
from ..core.step_plan import apply_step
from ..core.windows import require_positive_int

logger = logging.get_logger(__name__)

TEACHER_PREDICTION_TYPES = ("epsilon", "v_prediction")

_LENGTH_TOLERANCE = 0.01  # of a window

UNet = Callable[..., Any]
"""Called as `unet(latents, timesteps, encoder_hidden_states=..., [added_cond_kwargs=...], return_dict=False)[0]`."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One batch of prompts as the UNet takes it: embeddings (batch, tokens, width), and SDXL's added conditions.

    `added` has the UNet's names for them, with tensors (batch, ...); it is empty for Stable Diffusion. A UNet without
    prompts has embeddings (batch, 0), which say how many rows there are and in which type it computes.
    """

    prompt_embeds: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def join(self, other: Conditioning) -> Conditioning:
        """Both along the batch, self first."""
        return Conditioning(
            prompt_embeds=torch.cat([self.prompt_embeds, other.prompt_embeds]),
            added={name: torch.cat([value, other.added[name]]) for name, value in self.added.items()},
        )

    def unet_kwargs(self) -> dict[str, Any]:
        embeds = {"encoder_hidden_states": self.prompt_embeds} if self.prompt_embeds.numel() else {}
        return {**embeds, **({"added_cond_kwargs": dict(self.added)} if self.added else {})}


def sdxl_conditioning(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, time_ids: Tensor) -> Conditioning:
    """SDXL's conditions: embeddings (batch, tokens, width), pooled (batch, width), time ids (batch, 6)."""
    return Conditioning(prompt_embeds=prompt_embeds, added={"text_embeds": pooled_prompt_embeds, "time_ids": time_ids})


def teacher_coefficients(alpha: Scalar, alpha_next: Scalar, prediction_type: str) -> tuple[Scalar, Scalar]:
    """(a, b) of the teacher's DDIM step `z_next = a z + b output` from abar = `alpha` to the cleaner `alpha_next`.

    The type is one of `TEACHER_PREDICTION_TYPES`; `v_prediction` is v = sqrt(abar) eps - sqrt(1 - abar) x0
    (arXiv 2202.00512, appendix D).
    """
    if prediction_type == "epsilon":
        return ddim_coefficients(alpha, alpha_next)
    signal, sigma = alpha**0.5, (1.0 - alpha) ** 0.5
    signal_next, sigma_next = alpha_next**0.5, (1.0 - alpha_next) ** 0.5
    return signal_next * signal + sigma_next * sigma, sigma_next * signal - signal_next * sigma


class PFODESolver:
    """Solves the teacher's probability-flow ODE from the start of a time window to its end (arXiv 2405.07510, sec. 3).

    Args:
        scheduler: any diffusers scheduler with `alphas_cumprod` whose `config.prediction_type` is `epsilon` or
            `v_prediction`. Its `final_alpha_cumprod`, if it has one, is abar below the first timestep.
        order: 1 for DDIM, as published, or 2: each step but the first reuses the noise prediction of the step before,
            a linear multistep method in sigma = sqrt((1 - abar) / abar) (Adams-Bashforth, the idea of DPM-Solver++ 2M,
            arXiv 2211.01095). With the same number of calls its error is about half of DDIM's.

    Raises:
        ValueError: the scheduler has no alphas, or another prediction type, or the order is neither 1 nor 2.
    """

    def __init__(self, scheduler: Any, order: int = 1) -> None:
        name = type(scheduler).__name__
        if order not in (1, 2):
            raise ValueError(f"order={order!r} must be 1 (DDIM) or 2.")
        self.order = order
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"scheduler={name} must have alphas_cumprod, as DDIMScheduler has.")
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in TEACHER_PREDICTION_TYPES:
            allowed = ", ".join(TEACHER_PREDICTION_TYPES)
            raise ValueError(f"prediction_type={self.prediction_type!r} of {name} must be one of {allowed}.")
        alphas_cumprod = scheduler.alphas_cumprod
        self.num_train_timesteps = len(alphas_cumprod)
        final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", alphas_cumprod[0])).reshape(1)
        # Shifted by one, so that the index -1 (below the first timestep) has an entry as well.
        self._alphas = torch.cat([final.float(), alphas_cumprod.float().to(final.device)])
        self._guiders: dict[float, ClassifierFreeGuidance] = {}  # kept: diffusers logs a notice for each new one
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
        **settings: Any,
    ) -> Tensor:
        """The latents (batch, channels, height, width) at `t_end`, by deterministic steps, in the latents' type.

        Args:
            latents: (batch, channels, height, width) at t_start; float32 is advised whatever the UNet's type.
            unet: the frozen teacher. It gets latents in the type of `prompt_embeds` and is called once per step, with
                conditional and unconditional rows in one batch under guidance.
            t_start, t_end: continuous times, 0 <= t_end < t_start <= 1: one for all rows, or (batch,) each.
            prompt_embeds: (batch, tokens, width).
            negative_prompt_embeds: (batch, tokens, width), needed when `guidance_scale` is above 1.
            settings: `guidance_scale`, `num_steps` and `num_windows` of `solve_conditioned`.

        Raises:
            ValueError: inputs that do not fit together, or steps shorter than one timestep.
        """
        positive = Conditioning(prompt_embeds=prompt_embeds)
        negative = None if negative_prompt_embeds is None else Conditioning(prompt_embeds=negative_prompt_embeds)
        return self.solve_conditioned(latents, unet, t_start, t_end, positive, negative, **settings)

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
        """As `solve`, for the conditions of any family: those of the prompts, and of the empty one for guidance.

        Args:
            guidance_scale: at least 1, which is no guidance.
            num_steps: steps, each with one call of the UNet.
            num_windows: number K of equal windows: each step goes down `T // (K num_steps)` timesteps, as published.
                With None each row's own t_start and t_end decide, for windows of unequal lengths.
        """
        _check_conditions(len(latents), positive, negative, guidance_scale)
        stride = self._stride(num_steps, num_windows)
        _check_times(t_start, t_end, num_windows)
        start, end = _rows("t_start", t_start, latents), _rows("t_end", t_end, latents)
        guider = None
        if guidance_scale > 1.0 and negative is not None:
            positive, guider = positive.join(negative), self._guiders.get(guidance_scale)
            if guider is None:
                guider = self._guiders[guidance_scale] = ClassifierFreeGuidance(guidance_scale=guidance_scale)
        alphas, earlier = self._alphas.to(latents.device), None
        for k in range(num_steps):
            index, following = (self._index(start + (end - start) * (step / num_steps)) for step in (k, k + 1))
            if stride is not None:
                following = index - stride
            index = index.clamp(0, self.num_train_timesteps - 1)
            output = _predict(unet, latents, index, positive, guider)
            alpha, alpha_next = alphas[index + 1], alphas[following.clamp(min=-1) + 1]
            noise = output
            if self.order == 2 and self.prediction_type == "v_prediction":  # eps = sqrt(1 - abar) z + sqrt(abar) v
                noise = apply_step(latents, output, (1.0 - alpha) ** 0.5, alpha**0.5)
            length = _sigma(alpha_next) - _sigma(alpha)
            if earlier is None:  # also where abar is 0, and noise alone would not do
                step = teacher_coefficients(alpha, alpha_next, self.prediction_type)
                latents = apply_step(latents, output, *step)
            else:
                mean = _extrapolated(noise, length, *earlier)
                latents = apply_step(latents, mean, *ddim_coefficients(alpha, alpha_next))
            earlier = (noise, length) if self.order == 2 else None
        return latents

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
        total, count = self.num_train_timesteps, require_positive_int("num_windows", num_windows) * num_steps
        stride, rest = divmod(total, count)
        if stride == 0:
            raise ValueError(f"num_windows={num_windows} times num_steps={num_steps} must be at most {total}.")
        if rest and count not in self._uneven_logged:
            self._uneven_logged.add(count)
            logger.warning(
                f"num_windows * num_steps = {count} does not divide the {total} training timesteps, so that steps of "
                f"{stride} timesteps miss t_end; choose numbers that divide it, or num_windows=None."
            )
        return stride


class PFODESolverSDXL(PFODESolver):
    """`PFODESolver` with SDXL's added conditions: pooled embeddings and time ids.

    Its defaults are the published ones for SDXL, 10 steps in each of 4 windows.
    """

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
        num_steps: int = 10,
        num_windows: int | None = 4,
        **settings: Any,
    ) -> Tensor:
        """As `PFODESolver.solve`, with SDXL's conditions.

        Args:
            pooled_prompt_embeds: (batch, pooled width).
            negative_pooled_prompt_embeds: (batch, pooled width), needed when `guidance_scale` is above 1.
            resolution: pixels of the square images; the time ids are then (resolution, resolution, 0, 0, resolution,
                resolution): original size, no crop, target size.
            add_time_ids: time ids to use instead, (6,), (1, 6) or (batch, 6), for both prompts.
        """
        if add_time_ids is None:
            size = require_positive_int("resolution", resolution)
            add_time_ids = torch.tensor([size, size, 0, 0, size, size])
        time_ids = add_time_ids.to(prompt_embeds).reshape(-1, add_time_ids.shape[-1])
        if len(time_ids) == 1:
            time_ids = time_ids.expand(len(prompt_embeds), -1)
        positive = sdxl_conditioning(prompt_embeds, pooled_prompt_embeds, time_ids)
        negative = None
        if negative_prompt_embeds is not None and negative_pooled_prompt_embeds is not None:
            negative = sdxl_conditioning(negative_prompt_embeds, negative_pooled_prompt_embeds, time_ids)
        settings |= {"num_steps": num_steps, "num_windows": num_windows}
        return self.solve_conditioned(latents, unet, t_start, t_end, positive, negative, **settings)


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


def _sigma(alpha: Tensor) -> Tensor:
    return ((1.0 - alpha) / alpha) ** 0.5


def _extrapolated(noise: Tensor, length: Tensor, noise_before: Tensor, length_before: Tensor) -> Tensor:
    """The mean noise of a step from predictions (batch, ...) at its start and the start of the one before.

    A line through both, whose mean over the step is `(1 + r/2) noise - r/2 noise_before` for steps in the ratio r.
    """
    half = 0.5 * length / torch.where(length_before == 0.0, torch.inf, length_before)
    return apply_step(noise, noise_before, 1.0 + half, -half)


def _check_conditions(
    batch: int, positive: Conditioning, negative: Conditioning | None, guidance_scale: float
) -> None:
    if not math.isfinite(guidance_scale) or guidance_scale < 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number of at least 1 (1.0: no guidance).")
    if guidance_scale > 1.0 and negative is None:
        needed = "negative_prompt_embeds (for SDXL negative_pooled_prompt_embeds too)"
        raise ValueError(f"guidance_scale={guidance_scale} needs {needed}; without them use guidance_scale=1.0.")
    for prefix, given in {"": positive, "negative_": negative or positive}.items():
        for name, value in {"prompt_embeds": given.prompt_embeds, **given.added}.items():
            if len(value) != batch:
                raise ValueError(f"{prefix}{name} must have one row for each of {batch} latents; it has {len(value)}.")
    if negative is not None and negative.prompt_embeds.shape != positive.prompt_embeds.shape:
        raise ValueError(
            f"negative_prompt_embeds of shape {tuple(negative.prompt_embeds.shape)} must have the shape of "
            f"prompt_embeds, {tuple(positive.prompt_embeds.shape)}; encode both to the same length."
        )


def _rows(name: str, t: float | Tensor, latents: Tensor) -> Tensor:
    """The time of each row, float32 of shape (batch,) on the latents' device."""
    rows = torch.as_tensor(t, dtype=torch.float32, device=latents.device)
    if rows.ndim > 1 or rows.numel() not in (1, len(latents)):
        raise ValueError(f"{name} of shape {tuple(rows.shape)} must be one time, or one for each of the latents.")
    return rows.expand(len(latents))


def _check_times(t_start: float | Tensor, t_end: float | Tensor, num_windows: int | None) -> None:
    """Checks times that lie on the host; reading a tensor back from a device would stall it.

    Equal windows must be as long as their number says, since the steps would miss their ends otherwise.
    """
    if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in (t_start, t_end)):
        return
    start, end = torch.as_tensor(t_start), torch.as_tensor(t_end)
    if not bool(((0.0 <= end) & (end < start) & (start <= 1.0)).all()):
        raise ValueError(f"{t_start=} and {t_end=} must be times with 0 <= t_end < t_start <= 1 in every row.")
    if num_windows is not None and bool((((start - end) * num_windows - 1.0).abs() > _LENGTH_TOLERANCE).any()):
        rule = f"must lie 1/{num_windows} apart, the length of each of num_windows={num_windows} equal windows"
        raise ValueError(f"{t_start=} and {t_end=} {rule}; pass another num_windows, or None for any times.")
