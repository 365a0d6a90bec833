"""What runs before the loop: embeddings matched to the images, the starting latents, and the assembled stages."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..core.step_plan import apply_step
from .declare import Assembled, declared
from .images import repeat_images, require_count
from .inputs import as_outputs, guided_inputs, param, shared_inputs
from .set_timesteps import PeRFlowImg2ImgSetTimestepsStep, PeRFlowInpaintSetTimestepsStep, PeRFlowSetTimestepsStep
from .specs import guider_spec, unet_spec

_EMBEDDINGS = (
    *guided_inputs("prompt_embeds"),
    *guided_inputs("pooled_prompt_embeds", "ip_adapter_embeds", required=False),
)
_BATCH = (*shared_inputs("batch_size", "dtype", required=True), *shared_inputs("num_images_per_prompt"))


class PeRFlowInputStep(ModularPipelineBlocks):
    """Repeats the embeddings of texts and IP-Adapter images so that each image has a row; the first prompt's first.

    diffusers' input step puts the pooled embeddings and the IP-Adapters' in another order than the rest where there
    are several prompts with several images each, and writes into the caller's lists.
    """

    model_name = "stable-diffusion-xl"
    description = "Repeats the embeddings of texts and IP-Adapter images for the images of each prompt."
    expected_components = declared(guider_spec())  # unused: the first block that names the guider decides its default
    inputs = declared(*shared_inputs("num_images_per_prompt"), *_EMBEDDINGS)
    intermediate_outputs = declared(*as_outputs([*shared_inputs("batch_size", "dtype"), *_EMBEDDINGS]))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        prompts, images = block_state.prompt_embeds.shape[0], block_state.num_images_per_prompt
        block_state.batch_size, block_state.dtype = prompts, block_state.prompt_embeds.dtype
        for name in (entry.name for entry in self.inputs if entry.kwargs_type):
            given = getattr(block_state, name)
            if isinstance(given, Tensor):
                setattr(block_state, name, one_for_each_image(name, given, prompts, images))
            elif given is not None:  # one tensor for each IP-Adapter
                setattr(block_state, name, [one_for_each_image(name, tensor, prompts, images) for tensor in given])
        self.set_block_state(state, block_state)
        return components, state


def one_for_each_image(name: str, tensor: Tensor, prompts: int, images_per_prompt: int) -> Tensor:
    """The tensor with one row for each image, those of the first prompt first, from one row for all or each prompt."""
    require_count(name, len(tensor), prompts, prompts * images_per_prompt)
    return repeat_images(tensor, prompts * images_per_prompt)


_LATENTS = OutputParam("latents", Tensor, "Starting latents (images, channels, height/f, width/f).")


class PeRFlowImg2ImgPrepareLatentsStep(ModularPipelineBlocks):
    """Starting latents of image-to-image: `P[0] image_latents + Q[0] noise`, on the chord inside a window."""

    model_name = "stable-diffusion-xl"
    description = "Noises the given image to where the run starts; with `denoising_start` it is taken as it is."
    inputs = declared(
        param("latents", Tensor, "Starting latents, already noised, in place of the noised image."),
        *shared_inputs("image_latents", "noise_coefficients", required=True),
        *shared_inputs("denoising_start", "generator"),
        *_BATCH,
    )
    intermediate_outputs = declared(_LATENTS)

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device = components._execution_device
        if block_state.latents is not None:
            block_state.latents = block_state.latents.to(device)
        else:
            block_state.latents = _one_for_each(block_state, "image_latents", device)
            if block_state.denoising_start is None:
                noise = _draw_noise(block_state, block_state.latents)
                block_state.latents = _noised(block_state, block_state.latents, noise)
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowInpaintPrepareLatentsStep(ModularPipelineBlocks):
    """Starting latents of inpainting, and what the loop needs to keep the known part.

    The whole image is noised onto the path where the run starts. Where that is the start of the path, the hole is pure
    noise. A UNet of 9 channels is given mask and masked image beside the latents.
    """

    model_name = "stable-diffusion-xl"
    description = "Noises the given image to where the run starts and lays out mask, noise and conditioning."
    expected_components = declared(unet_spec())
    inputs = declared(
        param("latents", Tensor, "The noise to use, in place of one drawn with `generator`."),
        *shared_inputs("image_latents", "mask", "noise_coefficients", "step_plan", required=True),
        *shared_inputs("masked_image_latents", "generator"),
        *_BATCH,
    )
    intermediate_outputs = declared(
        _LATENTS,
        *as_outputs(shared_inputs("noise", "image_latents", "mask", "inpaint_conditioning")),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device = components._execution_device
        block_state.image_latents = _one_for_each(block_state, "image_latents", device)
        block_state.mask = _one_for_each(block_state, "mask", device)
        block_state.inpaint_conditioning = _conditioning(components.unet, block_state, device)
        noise = block_state.latents
        noise = _draw_noise(block_state, block_state.image_latents) if noise is None else noise.to(device)
        start, plan = _noised(block_state, block_state.image_latents, noise), block_state.step_plan
        begins_path = plan.window_index[0] == 0 and plan.times[0] == plan.window_start[0]
        block_state.noise = noise
        block_state.latents = torch.lerp(start, noise if begins_path else start, block_state.mask)
        self.set_block_state(state, block_state)
        return components, state


def _noised(block_state: Any, image_latents: Tensor, noise: Tensor) -> Tensor:
    signal, sigma = block_state.noise_coefficients[0].unbind()
    return apply_step(image_latents, noise, signal, sigma)


def _draw_noise(block_state: Any, like: Tensor) -> Tensor:
    return randn_tensor(like.shape, generator=block_state.generator, device=like.device, dtype=like.dtype)


def _one_for_each(block_state: Any, name: str, device: torch.device) -> Tensor:
    tensor = getattr(block_state, name).to(device=device, dtype=block_state.dtype)
    return one_for_each_image(name, tensor, block_state.batch_size, block_state.num_images_per_prompt)


def _conditioning(unet: Any, block_state: Any, device: torch.device) -> Tensor | None:
    """Mask and masked image as a 9-channel UNet takes them; None for a UNet that takes the latents alone."""
    if unet.config.in_channels == block_state.image_latents.shape[1]:
        return None
    if block_state.masked_image_latents is None:
        raise ValueError("masked_image_latents is missing for a UNet made for inpainting; pass it, or mask_image.")
    return torch.cat([block_state.mask, _one_for_each(block_state, "masked_image_latents", device)], dim=1)


_STAGES = ["set_timesteps", "prepare_latents", "prepare_add_cond"]


class PeRFlowSDXLBeforeDenoiseStep(Assembled, SequentialPipelineBlocks):
    """Windows, starting noise and SDXL's size conditioning of a text-to-image run."""

    block_classes = [
        PeRFlowSetTimestepsStep,
        StableDiffusionXLPrepareLatentsStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
    ]
    block_names = _STAGES
    description = "Prepares the loop: the window set-up, the starting noise and SDXL's size conditioning."


class PeRFlowSDXLImg2ImgBeforeDenoiseStep(Assembled, SequentialPipelineBlocks):
    """Windows from `strength` on, the noised image and SDXL's size conditioning of an image-to-image run."""

    block_classes = [
        PeRFlowImg2ImgSetTimestepsStep,
        PeRFlowImg2ImgPrepareLatentsStep,
        StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    ]
    block_names = _STAGES
    description = "Prepares the loop from an image: the window set-up, the noised image and SDXL's size conditioning."


class PeRFlowSDXLInpaintBeforeDenoiseStep(Assembled, SequentialPipelineBlocks):
    """Windows, the noised image, its mask and SDXL's size conditioning of an inpainting run."""

    block_classes = [
        PeRFlowInpaintSetTimestepsStep,
        PeRFlowInpaintPrepareLatentsStep,
        StableDiffusionXLImg2ImgPrepareAdditionalConditioningStep,
    ]
    block_names = _STAGES
    description = "Prepares the loop for inpainting: windows, noised image, mask and SDXL's size conditioning."


class PeRFlowSDXLAutoBeforeDenoiseStep(Assembled, AutoPipelineBlocks):
    """Inpainting where there is a mask, image-to-image where there is an image, else text-to-image."""

    block_classes = [
        PeRFlowSDXLInpaintBeforeDenoiseStep,
        PeRFlowSDXLImg2ImgBeforeDenoiseStep,
        PeRFlowSDXLBeforeDenoiseStep,
    ]
    block_names = ["inpaint", "img2img", "text2img"]
    block_trigger_inputs = ["mask", "image_latents", None]
    description = "Prepares the loop: inpainting for `mask`, image-to-image for `image_latents`, else text-to-image."
