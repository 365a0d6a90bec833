"""Ways of drawing an image that can be compared: a base model under standard solvers, and PeRFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from ..blocks.merge_delta import delta_path, guidance_in_effect
from ..blocks.specs import usual_recipe
from ..delta.files import read_recipe
from ..delta.merge import merge_record
from ..delta.recipe import DeltaRecipe

SOLVERS: dict[str, tuple[str, Any]] = {
    "ddim": ("DDIM", DDIMScheduler),
    "dpm": ("DPM-Solver++", DPMSolverMultistepScheduler),
    "euler": ("Euler", EulerDiscreteScheduler),
}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One way of drawing; `model` and `solver` are names for the table, a `guidance_scale` of 1 is none.

    `draw` takes prompts and noise (count, channels, height / factor, width / factor) to images (count, 3, height,
    width) in [0, 1].
    """

    model: str
    solver: str
    steps: int
    guidance_scale: float
    draw: Callable[[Sequence[str], Tensor], Tensor]

    @property
    def nfe(self) -> int:
        """Rows of the UNet per image: guidance counts double."""
        return self.steps * (2 if self.guidance_scale > 1.0 else 1)

    @property
    def label(self) -> str:
        return f"{self.model} {self.solver} {self.steps} steps"


def classic_pipeline(pipe: Any, scheduler: Any = None) -> Any:
    """The models of a pipeline that has not been called as the classic text-to-image pipeline of their family.

    `scheduler` takes the place of the pipeline's own.
    """
    given = {**pipe.components, **({} if scheduler is None else {"scheduler": scheduler})}
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts = {name: given[name] for name in names if name in given}
    if "tokenizer_2" in parts:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **safety)


def teacher_sampler(pipe: Any, solver: str, steps: int, guidance_scale: float, *, model: str = "teacher") -> Sampler:
    """A base model under its own scheduler ("stock") or a solver of `SOLVERS`.

    The solvers have trailing spacing, so that few steps start from pure noise.
    """
    if solver == "stock":
        name, scheduler = type(pipe.scheduler).__name__.removesuffix("Scheduler"), pipe.scheduler
    elif solver in SOLVERS:
        name, kind = SOLVERS[solver]
        # DDIM's own defaults clip latents to [-1, 1], which no latent diffusion model is made for.
        changes = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
        scheduler = kind.from_config(pipe.scheduler.config, **changes)
    else:
        raise ValueError(f"solver={solver!r} must be one of {', '.join(('stock', *SOLVERS))}.")
    own = classic_pipeline(pipe, scheduler)
    own.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
        return own(prompt=list(prompts), latents=latents, **_size(own, latents), **settings).images

    return Sampler(model=model, solver=name, steps=steps, guidance_scale=guidance_scale, draw=draw)


def perflow_sampler(
    pipe: Any,
    steps: int,
    *,
    delta: Path | Literal[False] | None = None,
    guidance_scale: float | None = None,
    model: str = "student",
) -> Sampler:
    """A pipeline of PeRFlow blocks with all components loaded, in at least as many steps as it has windows.

    `delta` is the file to merge, False for none; by default the one that the pipeline's configuration names. The
    guidance is by default that of the pipeline's next call.
    """
    path = None if delta is False else delta_path(delta, pipe)
    record = merge_record(pipe.unet)
    recipe = read_recipe(path) if path else record.recipe if record else DeltaRecipe()
    windows = recipe.num_time_windows or pipe.config.num_time_windows or 4
    if steps < windows:
        raise ValueError(f"steps={steps} is below the model's {windows} time windows; pass at least {windows}.")
    arguments = {"delta": delta if path is None else path, "guidance_scale": guidance_scale}
    given = {name: value for name, value in arguments.items() if value is not None}
    if guidance_scale is None:
        guidance_scale = guidance_in_effect(pipe.guider, pipe.config.guidance_scale, recipe, usual_recipe(pipe))

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        settings = {"num_inference_steps": steps, "output_type": "pt", "output": "images", **given}
        return pipe(prompt=list(prompts), latents=latents, **_size(pipe, latents), **settings)

    return Sampler(model=model, solver="PeRFlow", steps=steps, guidance_scale=guidance_scale, draw=draw)


def seeded_latents(pipe: Any, seeds: Iterable[int], size: tuple[int, int] | None = None) -> Tensor:
    """Noise of a seed for each image, from the CPU's generator, for the UNet's own size or (width, height) pixels."""
    side, factor = pipe.unet.config.sample_size, pipe.vae_scale_factor
    if size is not None and any(pixels % factor for pixels in size):
        raise ValueError(f"a size of {size[0]}x{size[1]} must be a multiple of {factor} pixels; pass another.")
    width, height = (side, side) if size is None else (pixels // factor for pixels in size)
    shape = (1, pipe.unet.config.in_channels, height, width)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(noise).to(pipe.unet.device, pipe.unet.dtype)


def _size(pipe: Any, latents: Tensor) -> dict[str, int]:
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    return {"height": height, "width": width}
