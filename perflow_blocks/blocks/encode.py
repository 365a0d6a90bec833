"""Encoding: diffusers' own blocks, corrected for lists of generators and for embeddings in place of a prompt."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ConfigSpec
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLInpaintVaeEncoderStep,
    StableDiffusionXLIPAdapterStep,
    StableDiffusionXLTextEncoderStep,
    StableDiffusionXLVaeEncoderStep,
)
from diffusers.utils import logging
from torch import Tensor

from ..delta.model_lock import model_lock
from .declare import Assembled, declared
from .guiders import guider_of_call
from .images import as_batch, count_images, image_size, mask_processor, repeat_images
from .inputs import as_outputs, embeddings_inputs, shared_input
from .specs import guider_spec, unet_spec
from .vae import guarded_vae

logger = logging.get_logger(__name__)


class PeRFlowTextEncoderStep(StableDiffusionXLTextEncoderStep):
    """diffusers' text encoder with this call's guider. One thread at a time uses tokenizers and encoders.

    A tokenizer keeps padding and truncation on itself, and an encoder the scale of its LoRAs.
    """

    expected_components = declared(
        guider_spec(),
        *(spec for spec in StableDiffusionXLTextEncoderStep().expected_components if spec.name != "guider"),
    )
    inputs = declared(*StableDiffusionXLTextEncoderStep().inputs, shared_input("guider"))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
        used = {id(part): part for part in (getattr(components, name) for name in names) if part is not None}
        with ExitStack() as locks:
            for _, part in sorted(used.items()):  # in one order, so that no two threads wait for each other
                locks.enter_context(model_lock(part))
            super().__call__(_with_guider(components, self.get_block_state(state)), state)
        return components, state


def _with_guider(components: Any, block_state: Any) -> Any:
    """What a stock block, which reads the component, takes for the pipeline: the same with this call's guider."""
    view = copy.copy(components)
    view.guider = guider_of_call(components, block_state)
    return view


class PeRFlowEmbeddingsStep(ModularPipelineBlocks):
    """Takes text embeddings that were made before, in place of a prompt.

    Where the guider wants negative ones and none are given, they are zeros, as for an empty negative prompt of SDXL
    (`force_zeros_for_empty_prompt`).

    Raises:
        ValueError: negative embeddings are missing and the model does not take zeros for them.
    """

    model_name = "stable-diffusion-xl"
    description = "Takes text embeddings in place of a prompt, with zeros for negative ones that are not given."
    expected_components = declared(guider_spec())
    expected_configs = declared(
        ConfigSpec("force_zeros_for_empty_prompt", True, "Whether an empty negative prompt is all zeros.")
    )
    inputs = declared(*embeddings_inputs(), shared_input("guider"))
    intermediate_outputs = declared(*as_outputs(embeddings_inputs()))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device, guider = components._execution_device, guider_of_call(components, block_state)
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            given = getattr(block_state, name).to(device)
            negative = getattr(block_state, f"negative_{name}")
            if negative is None and guider.num_conditions > 1:
                if not components.config.force_zeros_for_empty_prompt:
                    raise ValueError(f"negative_{name} is missing; pass it beside {name}, or a guider of scale 1.")
                negative = torch.zeros_like(given)
            setattr(block_state, name, given)
            setattr(block_state, f"negative_{name}", None if negative is None else negative.to(device))
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowAutoTextEncoderStep(Assembled, AutoPipelineBlocks):
    """Encodes `prompt`, or takes `prompt_embeds`."""

    block_classes = [PeRFlowTextEncoderStep, PeRFlowEmbeddingsStep]
    block_names = ["prompt", "embeddings"]
    block_trigger_inputs = ["prompt", "prompt_embeds"]
    description = "Encodes the prompt where one is given, else takes the text embeddings that are."


class PeRFlowIPAdapterStep(StableDiffusionXLIPAdapterStep):
    """diffusers' IP-Adapter step with this call's guider.

    Without guidance the stock step fails because the negative embeddings are missing.
    """

    inputs = declared(*StableDiffusionXLIPAdapterStep().inputs, shared_input("guider"))
    intermediate_outputs = declared(
        *(replace(output, type_hint=list[Tensor]) for output in StableDiffusionXLIPAdapterStep().intermediate_outputs)
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        super().__call__(_with_guider(components, self.get_block_state(state)), state)
        return components, state

    def set_block_state(self, state: PipelineState, block_state: Any) -> None:
        if "negative_ip_adapter_embeds" not in block_state.as_dict():
            block_state.negative_ip_adapter_embeds = None
        super().set_block_state(state, block_state)


class PeRFlowAutoIPAdapterStep(Assembled, AutoPipelineBlocks):
    """Encodes the images for IP-Adapters where there are some."""

    block_classes = [PeRFlowIPAdapterStep]
    block_names = ["ip_adapter"]
    block_trigger_inputs = ["ip_adapter_image"]
    description = "Encodes `ip_adapter_image` where it is given, for the IP-Adapters that are loaded; else is skipped."


class PeRFlowVaeEncoderStep(StableDiffusionXLVaeEncoderStep):
    """diffusers' VAE encoder with a `GuardedVAE`, and with a list of generators allowed for fewer images."""

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        inner = _match_images(state)
        inner.values.update(_target_size(components, state))
        super().__call__(guarded_vae(components), inner)
        return components, _take_outputs(self, state, inner)


class PeRFlowInpaintVaeEncoderStep(StableDiffusionXLInpaintVaeEncoderStep):
    """diffusers' VAE encoder for inpainting, at the image's own size unless the call names another.

    It does not encode the masked image for a 4-channel UNet, which does not take it. With `soft_mask` the mask's grey
    values are kept.
    """

    expected_components = declared(*StableDiffusionXLInpaintVaeEncoderStep().expected_components, unet_spec())
    inputs = declared(*StableDiffusionXLInpaintVaeEncoderStep().inputs, shared_input("soft_mask"))

    # The stock method of this class reads `self.vae` where the VAE has latent statistics, which no block has.
    _encode_vae_image = StableDiffusionXLVaeEncoderStep._encode_vae_image

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        inner = _match_images(state)
        if state.get("padding_mask_crop") is None:
            inner.values.update(_target_size(components, state))
        view = guarded_vae(components)
        view.mask_processor = mask_processor(components, self.get_block_state(state))
        super().__call__(view, inner)
        return components, _take_outputs(self, state, inner)

    def prepare_mask_latents(
        self, components: Any, mask: Tensor, masked_image: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor | None]:
        if components.num_channels_unet == components.num_channels_latents:
            masked_image = None
        return super().prepare_mask_latents(components, mask, masked_image, *args)


class PeRFlowAutoVaeEncoderStep(Assembled, AutoPipelineBlocks):
    """Encodes the given image: with a mask for inpainting, alone for image-to-image."""

    block_classes = [PeRFlowInpaintVaeEncoderStep, PeRFlowVaeEncoderStep]
    block_names = ["inpaint", "img2img"]
    block_trigger_inputs = ["mask_image", "image"]
    description = "Encodes `image` where one is given, for inpainting with `mask_image`; else is skipped."


def _match_images(state: PipelineState) -> PipelineState:
    """A copy of the state with as many images as masks, so that the stock blocks can pair them.

    Each generator of a list gets an image of its own, to sample latents from. One image or one mask for all stays as
    it is otherwise: the stock blocks spread it, and a crop needs a single mask.
    The copy has no `dtype`, which is the latents' type, so that they encode in the VAE's own.
    """
    values = {**state.values, "dtype": None}
    image, mask = as_batch(values.get("image")), as_batch(values.get("mask_image"), mask=True)
    values, generator = {**values, "image": image, "mask_image": mask}, values.get("generator")
    images, masks = count_images(image), 1 if mask is None else count_images(mask)
    generators = len(generator) if isinstance(generator, list) else 1
    count = max(images, masks, generators)
    if images > 1 or generators > 1:
        values["image"] = repeat_images(image, count)
    if masks > 1:
        values["mask_image"] = repeat_images(mask, count)
    return PipelineState(values=values, kwargs_mapping=dict(state.kwargs_mapping))


def _target_size(components: Any, state: PipelineState) -> dict[str, int]:
    """Height and width to encode the image at, multiples of the processor's factor; warns if it changes the image's.

    Those of the call hold. Otherwise they are the image's own, rounded down.
    """
    image = state.get("image")
    given = dict(zip(("height", "width"), image_size(image), strict=True))
    wanted = {name: state.get(name) or size for name, size in given.items()}
    # With both given, the processor only rounds them down.
    rounded = components.image_processor.get_default_height_width(image, **wanted)
    target = dict(zip(wanted, rounded, strict=True))
    if any(state.get(name) is None and target[name] != given[name] for name in given):
        factor = components.image_processor.config.vae_scale_factor
        logger.warning(
            f"image is {given['width']}x{given['height']}, not a multiple of {factor}; it is resized to "
            f"{target['width']}x{target['height']}. To choose another size, pass height and width."
        )
    return target


def _take_outputs(block: ModularPipelineBlocks, state: PipelineState, inner: PipelineState) -> PipelineState:
    for output in block.intermediate_outputs:
        state.set(output.name, inner.get(output.name), output.kwargs_type)
    return state
