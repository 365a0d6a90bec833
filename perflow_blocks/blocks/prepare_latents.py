"""The latents that a run from a given picture starts with: the picture, noised onto the student's path."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.step_plan import apply_step
from .images import one_for_each_image
from .inputs import (
    batch_inputs,
    denoising_start_input,
    generator_input,
    image_latents_input,
    mask_input,
    noise_coefficients_input,
    param,
    step_plan_input,
)
from .specs import unet_spec


class PeRFlowImg2ImgPrepareLatentsStep(ModularPipelineBlocks):
    """Starting latents of image-to-image: `P[0] image_latents + Q[0] noise`, on the chord inside a window."""

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Noises the given picture to where the run starts; with `denoising_start` it is taken as it is."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            param("latents", Tensor, "Starting latents, already noised, in place of the noised picture."),
            image_latents_input(),
            noise_coefficients_input(),
            denoising_start_input(),
            generator_input(),
            *batch_inputs(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", Tensor, "Starting latents (pictures, channels, height/f, width/f).")]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device = components._execution_device
        if block_state.latents is not None:
            block_state.latents = block_state.latents.to(device)
        else:
            image_latents = _one_for_each(block_state, "image_latents", device)
            if block_state.denoising_start is None:
                noise = _draw(block_state, image_latents)
                signal, sigma = block_state.noise_coefficients[0].unbind()
                image_latents = apply_step(image_latents, noise, signal, sigma)
            block_state.latents = image_latents
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowInpaintPrepareLatentsStep(ModularPipelineBlocks):
    """Starting latents of inpainting, and what the loop needs to keep the known part.

    The whole picture is noised onto the path where the run starts; if that is where the path itself does, the hole is
    pure noise. A UNet of 9 channels is given mask and masked picture beside the latents.

    Raises:
        ValueError: mask, picture and prompts differ in number, or the UNet takes neither 4 nor 9 channels.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Noises the given picture to where the run starts and lays out mask, noise and conditioning."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [unet_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            param("latents", Tensor, "The noise to use, or with `denoising_start` the latents to go on from."),
            param("noise", Tensor, "The noise of the earlier run, for one that goes on at `denoising_start`."),
            image_latents_input(),
            mask_input(),
            param("masked_image_latents", Tensor, "Latents of the picture without its hole, for a 9-channel UNet."),
            noise_coefficients_input(),
            step_plan_input(),
            denoising_start_input(),
            generator_input(),
            *batch_inputs(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        latents = "(pictures, channels, height/f, width/f)."
        return [
            OutputParam("latents", Tensor, f"Starting latents {latents}"),
            OutputParam("noise", Tensor, f"The noise of the known part {latents}"),
            OutputParam("image_latents", Tensor, f"The given picture's clean latents {latents}"),
            OutputParam("mask", Tensor, "What to repaint (pictures, 1, height/f, width/f): 1 is painted, 0 kept."),
            OutputParam(
                "inpaint_conditioning", Tensor, "Mask and masked-image latents for a 9-channel UNet, None for others."
            ),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device = components._execution_device
        block_state.image_latents = _one_for_each(block_state, "image_latents", device)
        block_state.mask = _one_for_each(block_state, "mask", device)
        block_state.inpaint_conditioning = _conditioning(components.unet, block_state, device)
        goes_on = block_state.denoising_start is not None
        given = block_state.noise if goes_on else block_state.latents
        noise = _draw(block_state, block_state.image_latents) if given is None else given.to(device)
        block_state.noise = noise
        if not goes_on:
            signal, sigma = block_state.noise_coefficients[0].unbind()
            start = apply_step(block_state.image_latents, noise, signal, sigma)
            plan = block_state.step_plan
            begins_path = plan.window_index[0] == 0 and plan.times[0] == plan.window_start[0]
            hole = noise if begins_path else start
            block_state.latents = torch.lerp(start, hole, block_state.mask)
        else:
            start = block_state.image_latents if block_state.latents is None else block_state.latents
            block_state.latents = start.to(device)
        self.set_block_state(state, block_state)
        return components, state


def _draw(block_state: Any, like: Tensor) -> Tensor:
    return randn_tensor(like.shape, generator=block_state.generator, device=like.device, dtype=like.dtype)


def _one_for_each(block_state: Any, name: str, device: torch.device) -> Tensor:
    tensor = getattr(block_state, name).to(device=device, dtype=block_state.dtype)
    return one_for_each_image(name, tensor, block_state.batch_size, block_state.num_images_per_prompt)


def _conditioning(unet: Any, block_state: Any, device: torch.device) -> Tensor | None:
    channels, taken = block_state.image_latents.shape[1], unet.config.in_channels
    if taken == channels:
        return None
    if taken != 2 * channels + 1:
        raise ValueError(
            f"the UNet takes {taken} channels; inpainting needs one with {channels}, or {2 * channels + 1} "
            "for mask and masked picture."
        )
    if block_state.masked_image_latents is None:
        raise ValueError(
            f"a UNet of {taken} channels needs masked_image_latents; pass image and mask_image, or these."
        )
    return torch.cat([block_state.mask, _one_for_each(block_state, "masked_image_latents", device)], dim=1)
