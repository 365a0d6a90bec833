"""Decoding: diffusers' own blocks, and for inpainting the known pixels put back as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import VaeImageProcessor
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLInpaintDecodeStep,
)
from PIL import Image
from torch import Tensor

from .declare import Assembled, declared
from .images import image_size, mask_processor, pil_images, repeat_images
from .inputs import Images, param, shared_input
from .vae import guarded_vae

Decoded = list[Image.Image] | np.ndarray | Tensor


def images_output() -> OutputParam:
    """The one output of every preset."""
    return OutputParam("images", Decoded, "The images, as `output_type` says; for `latent` the latents as they are.")


_MASK_SETTINGS = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}


def _processor(name: str, description: str, **settings: bool) -> ComponentSpec:
    """As diffusers' own blocks declare it, so that the pipeline has one of the name."""
    config = FrozenDict({"vae_scale_factor": 8, **settings})
    return ComponentSpec(name, VaeImageProcessor, description, config, default_creation_method="from_config")


class PeRFlowKeepKnownPixelsStep(ModularPipelineBlocks):
    """Puts the pixels outside the mask back exactly: decoding known latents alone gives only nearly what they were."""

    model_name = "stable-diffusion-xl"
    description = "Puts the known pixels of an inpainted image back as they were; `keep_known_pixels=False` leaves it."
    expected_components = declared(
        _processor("image_processor", "Resizes the given image."),
        _processor("mask_processor", "Resizes the mask; makes it 0 or 1 unless it is soft.", **_MASK_SETTINGS),
    )
    inputs = declared(
        param("images", Decoded, "The decoded images.", required=True),
        param("image", Images, "The image that was given, or one for each prompt.", required=True),
        param("mask_image", Images, "The mask that was given: white is painted, black kept.", required=True),
        shared_input("soft_mask"),
        param("keep_known_pixels", bool, "Whether pixels outside the mask are put back exactly.", default=True),
        shared_input("output_type"),
    )
    intermediate_outputs = declared(OutputParam("images", Decoded, "The images, with the known pixels as given."))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        if block_state.keep_known_pixels and block_state.output_type != "latent":
            block_state.images = _compose(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


def _compose(components: Any, block_state: Any) -> Decoded:
    painted, kind = block_state.images, block_state.output_type
    height, width = image_size(painted)
    given = components.image_processor.preprocess(block_state.image, height=height, width=width)
    hole = mask_processor(components, block_state).preprocess(block_state.mask_image, height=height, width=width)
    given, hole = repeat_images(given, len(painted)), repeat_images(hole, len(painted))
    known = components.image_processor.postprocess(given, output_type=kind)
    if kind == "pil":
        masks = pil_images(hole.cpu())
        return [Image.composite(*three) for three in zip(painted, known, masks, strict=True)]
    if kind == "np":
        mask = hole.permute(0, 2, 3, 1).float().cpu().numpy()
        return mask * painted + (1.0 - mask) * known
    return torch.lerp(known.to(painted), painted, hole.to(painted))


class PeRFlowDecodeStep(StableDiffusionXLDecodeStep):
    """diffusers' decoder with a `GuardedVAE`, whose type may be another than the latents': images are always finite.

    Raises:
        ValueError: the decoded images are not finite, in float32 too, or the VAE cannot be made float32.
    """

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        if state.get("output_type") == "latent":
            return super().__call__(components, state)
        latents, view = state.get("latents"), guarded_vae(components)
        state.set("latents", latents.to(view.vae.dtype).to(view.vae.decoding_dtype))
        super().__call__(view, state)
        state.set("latents", latents)
        return components, state


class PeRFlowInpaintCropDecodeStep(StableDiffusionXLInpaintDecodeStep):
    """Decodes, then lays the painted crop over the given image."""

    block_classes = [PeRFlowDecodeStep, *StableDiffusionXLInpaintDecodeStep.block_classes[1:]]


class PeRFlowInpaintDecodeStep(Assembled, SequentialPipelineBlocks):
    """Decodes, then puts the known pixels back."""

    block_classes = [PeRFlowDecodeStep, PeRFlowKeepKnownPixelsStep]
    block_names = ["decode", "keep_known_pixels"]
    description = "Decodes the latents and puts the known pixels of the given image back."


class PeRFlowAutoDecodeStep(Assembled, AutoPipelineBlocks):
    """Decodes; for inpainting with the known pixels put back, or the whole painted crop laid over the image."""

    block_classes = [PeRFlowInpaintCropDecodeStep, PeRFlowInpaintDecodeStep, PeRFlowDecodeStep]
    block_names = ["inpaint_crop", "inpaint", "non-inpaint"]
    block_trigger_inputs = ["padding_mask_crop", "mask_image", None]
    description = "Decodes the latents; for inpainting, puts the known pixels back or lays the crop over the image."
