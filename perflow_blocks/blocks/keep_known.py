"""The step of the inpainting loop that puts the known part of the picture back on its path."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

from ..core.step_plan import apply_step
from .inputs import (
    image_latents_input,
    inpaint_conditioning_input,
    latents_input,
    mask_input,
    noise_coefficients_input,
    noise_input,
)
from .loop_block import LoopBlock, Repeat


class PeRFlowLoopKeepKnownStep(LoopBlock):
    """Outside the mask the latents are the known picture, noised to where the step ended; at t = 0 the picture itself.

    A UNet that sees mask and picture through its own 9 channels needs no such help until the last step.
    """

    @property
    def description(self) -> str:
        return "Loop step for inpainting: outside the mask the latents become the known picture, noised on the path."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            latents_input(),
            image_latents_input(),
            mask_input(),
            noise_input(),
            noise_coefficients_input(),
            inpaint_conditioning_input(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f) with the known part kept.")
        ]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        table = block_state.noise_coefficients
        if block_state.inpaint_conditioning is None or i + 2 == table.shape[0]:
            signal, sigma = table[i + 1].unbind()
            known = apply_step(block_state.image_latents, block_state.noise, signal, sigma)
            block_state.latents = torch.lerp(known, block_state.latents, block_state.mask)
        return components, block_state

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        """A run that was stopped ends with predicted clean latents, so the known part is the clean picture."""
        if block_state.stop_requested:
            block_state.latents = torch.lerp(block_state.image_latents, block_state.latents, block_state.mask)
