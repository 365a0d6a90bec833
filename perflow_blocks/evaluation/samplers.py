"""The ways of drawing that are compared: the teacher under standard solvers, and PeRFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, ModularPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..blocks.merge_delta import delta_path, guidance_in_effect
from ..delta.files import read_recipe
from ..delta.recipe import DeltaRecipe
from ..demo import perflow_pipeline, teacher_pipeline
from ..demo.models import GUIDANCE_SCALE

SOLVERS: dict[str, Any] = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One way of drawing.

    Attributes:
        model: what predicts, for the table.
        solver: what steps, for the table.
        steps: solver steps.
        guidance_scale: classifier-free guidance at sampling time; 1 is none.
        draw: prompts and noise (count, 4, height / factor, width / factor) to pictures (count, 3, height, width) in
            [0, 1].
    """

    model: str
    solver: str
    steps: int
    guidance_scale: float
    draw: Callable[[Sequence[str], Tensor], Tensor]

    @property
    def nfe(self) -> int:
        """Rows of the UNet per picture: guidance counts double."""
        return self.steps * (2 if self.guidance_scale > 1.0 else 1)

    @property
    def label(self) -> str:
        return f"{self.model} {self.solver} {self.steps} steps"


def teacher_sampler(pipe: StableDiffusionXLPipeline, solver: str, steps: int, guidance_scale: float) -> Sampler:
    """The teacher under a solver of `SOLVERS`, with trailing spacing, so that few steps start from pure noise.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is unknown; pass one of {', '.join(SOLVERS)}.")

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        # DDIM's own defaults clip latents to [-1, 1], which no latent diffusion model is made for.
        scheduler = SOLVERS[solver].from_config(
            pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
        )
        own = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)
        own.set_progress_bar_config(disable=True)
        return own(
            prompt=list(prompts),
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        ).images

    return Sampler(model="teacher", solver=solver, steps=steps, guidance_scale=guidance_scale, draw=draw)


def perflow_sampler(pipe: ModularPipeline, steps: int, *, delta: Path | None = None) -> Sampler:
    """A PeRFlow pipeline with the guidance that its next call would have.

    Args:
        pipe: a pipeline of PeRFlow blocks with all components loaded.
        steps: solver steps.
        delta: the file to merge, where the pipeline's own configuration names none.

    Raises:
        ValueError: fewer steps than windows.
    """
    path = delta_path(delta, pipe)
    recipe = DeltaRecipe() if path is None else read_recipe(path)
    windows = recipe.num_time_windows or pipe.config.num_time_windows or 4
    if steps < windows:
        raise ValueError(f"steps={steps} is below the model's {windows} time windows; pass at least {windows}.")
    guidance_scale = guidance_in_effect(pipe.guider, pipe.config.guidance_scale, recipe)
    file = {} if path is None else {"delta": path}

    def draw(prompts: Sequence[str], latents: Tensor) -> Tensor:
        return pipe(
            prompt=list(prompts),
            latents=latents,
            num_inference_steps=steps,
            output_type="pt",
            output="images",
            **file,
        )

    return Sampler(model="student", solver="PeRFlow", steps=steps, guidance_scale=guidance_scale, draw=draw)


def demo_samplers(*, quick: bool = False) -> list[Sampler]:
    """The rows of the embedded model's table; `quick` leaves out those of 50 steps."""
    teacher, student = teacher_pipeline(), perflow_pipeline()
    student.set_progress_bar_config(disable=True)
    samplers = [] if quick else [teacher_sampler(teacher, solver, 50, GUIDANCE_SCALE) for solver in SOLVERS]
    samplers += [teacher_sampler(teacher, solver, steps, GUIDANCE_SCALE) for steps in (8, 4, 2) for solver in SOLVERS]
    samplers += [teacher_sampler(teacher, solver, steps, 1.0) for steps in (8, 4) for solver in SOLVERS]
    return samplers + [perflow_sampler(student, steps) for steps in (4, 6, 8)]
