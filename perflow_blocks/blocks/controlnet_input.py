"""What a ControlNet is given: diffusers' own blocks, kept from writing into the caller's list."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLControlNetInputStep,
    StableDiffusionXLControlNetUnionInputStep,
)

from .declare import Assembled
from .specs import vae_spec


class PeRFlowControlNetUnionInputStep(StableDiffusionXLControlNetUnionInputStep):
    """diffusers' step, which puts its tensors into the list `control_image`, on a list of its own."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, vae_spec()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            *super().intermediate_outputs,
            OutputParam("control_image", list[torch.Tensor], "The control pictures, as the ControlNet takes them."),
            OutputParam("control_mode", list[int], "The kind of each control picture."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        if isinstance(state.get("control_image"), list):
            state.set("control_image", list(state.get("control_image")))
        return super().__call__(components, state)


class PeRFlowAutoControlNetInputStep(Assembled, AutoPipelineBlocks):
    """Prepares the control pictures: for a ControlNet-Union with `control_mode`, else for one or more ControlNets."""

    block_classes = [PeRFlowControlNetUnionInputStep, StableDiffusionXLControlNetInputStep]
    block_names = ["controlnet_union", "controlnet"]
    block_trigger_inputs = ["control_mode", "control_image"]

    @property
    def description(self) -> str:
        return "Prepares `control_image`, for a ControlNet-Union where `control_mode` is given; else is skipped."
