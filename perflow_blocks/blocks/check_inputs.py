"""The first block of a preset: finds a caller's mistakes before a model runs or a weight changes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam

from .checks.components import check_dtypes, check_loaded, forget_done_stages, warn_of_idle_inputs
from .checks.conditions import check_controlnet, check_ip_adapters
from .checks.pictures import check_pictures
from .checks.request import check_latents, check_sampling, check_size, count_prompts
from .guiders import check_guider
from .request import request_inputs
from .specs import guider_spec, unet_spec, vae_spec


class PeRFlowCheckInputsStep(ModularPipelineBlocks):
    """Checks what the caller asks for and changes nothing.

    Standing first, it also gives the pipeline its default guider and the descriptions of its inputs.

    Raises:
        ValueError: one line that names the rule, the value and the remedy.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Checks the request before anything expensive runs: one clear error for each mistake."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec(), vae_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return request_inputs()

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        request = self.get_block_state(state)
        loaded, blocks = components.components, components._blocks
        forget_done_stages(request, blocks.sub_blocks)
        check_loaded(loaded, request, blocks.required_inputs, blocks.sub_blocks)
        check_guider(components.guider, components.unet)
        warn_of_idle_inputs(request, [block for block in blocks.sub_blocks.values() if block is not self])
        check_sampling(request)
        prompts = count_prompts(request)
        pictures = prompts * request.num_images_per_prompt
        check_size(request, components.vae_scale_factor)
        check_pictures(request, prompts, pictures, components.num_channels_latents, components.num_channels_unet)
        check_latents(request, pictures, components.num_channels_latents, components.vae_scale_factor)
        check_controlnet(loaded.get("controlnet"), request, prompts)
        check_ip_adapters(components.unet, components.guider, request, "ip_adapter" in blocks.sub_blocks)
        check_dtypes(loaded, request, blocks.sub_blocks)
        return components, state
