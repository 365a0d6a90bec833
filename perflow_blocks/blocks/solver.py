"""The step of the loop that moves the latents along the window's straight line."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

from ..core.step_plan import apply_step
from .inputs import latents_input, noise_pred_input, step_coefficients_input


class PeRFlowLoopSolverStep(ModularPipelineBlocks):
    """One Euler step along the window's straight line: `latents = A[i] latents + B[i] noise_pred`."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Loop step that moves the latents to the next time: one multiply-add with the step's coefficients."

    @property
    def inputs(self) -> list[InputParam]:
        return [latents_input(), noise_pred_input(), step_coefficients_input()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", Tensor, "Denoised latents (batch, channels, height/f, width/f).")]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        row = block_state.step_coefficients[i]
        block_state.latents = apply_step(block_state.latents, block_state.noise_pred, row[0], row[1])
        return components, block_state
