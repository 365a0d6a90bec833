"""All that the VAE does: diffusers' encoding and decoding steps, made finite, and known pixels put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
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
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLInpaintVaeEncoderStep,
    StableDiffusionXLVaeEncoderStep,
    retrieve_latents,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLInpaintDecodeStep,
)
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ..delta.model_lock import model_lock
from .declare import Assembled, declared
from .finite_guard import HALF, can_be_float32, in_float32, not_finite, precision
from .images import as_batch, count_images, image_size, repeat_images
from .inputs import param, shared_input, shared_inputs
from .specs import unet_spec

logger = logging.get_logger(__name__)

Decoded = list[Image.Image] | np.ndarray | Tensor

_REMEDY = 'use a VAE in float32, pipe.vae.to(torch.float32), or one made for float16, "madebyollin/sdxl-vae-fp16-fix"'


def guarded_vae(components: Any) -> Any:
    """A view of the components for one step, whose `vae` is a `GuardedVAE`."""
    view = copy.copy(components)
    view.vae = GuardedVAE(components.vae)
    return view


class GuardedVAE:
    """Encodes and decodes with a VAE as diffusers does, but never to values that are not finite.

    A half-precision VAE whose result is not finite runs again in float32, with a warning; a ValueError says where that
    does not help. A VAE whose configuration sets `force_upcast` runs in float32 at once, as in diffusers: float16 for
    decoding, bfloat16 as well for encoding. Other threads that use the VAE wait meanwhile.
    """

    def __init__(self, vae: Any) -> None:
        self._vae, self._lock = vae, model_lock(vae)
        self.config = FrozenDict({**vae.config, "force_upcast": False})
        with self._lock.running():
            self.dtype: torch.dtype = vae.dtype
            # A default of the class says nothing: the VAEs of SD 1.5 and 2.1, whose files are silent, work in half.
            wanted = vae.config.force_upcast and "force_upcast" not in vae.config.get("_use_default_values", ())
            self._upcasts = wanted and self.dtype in HALF and can_be_float32(vae)
        # The type in which latents are scaled and decoded.
        self.decoding_dtype = torch.float32 if self._upcasts and self.dtype == torch.float16 else self.dtype

    def to(self, *args: Any, **kwargs: Any) -> GuardedVAE:
        """Nothing: diffusers would change the type of weights that threads share."""
        return self

    def encode(self, images: Tensor) -> Any:
        """The VAE's output for images (batch, 3, height, width) in [-1, 1]."""
        values = partial(retrieve_latents, sample_mode="argmax")
        return self._finite("encoded", self._vae.encode, images, self._upcasts, values)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Images (batch, 3, height, width) of latents that are scaled for the VAE, as a tuple of one."""
        run = partial(self._vae.decode, return_dict=False)
        return self._finite("decoded", run, latents, self.decoding_dtype != self.dtype, itemgetter(0))

    def _finite(
        self, done: str, run: Callable[[Tensor], Any], given: Tensor, upcast: bool, values: Callable[[Any], Tensor]
    ) -> Any:
        """`run(given)`, in float32 if `upcast` is set or the `values` of the result are not finite otherwise."""
        problem = None
        if not upcast:
            with self._lock.running():
                output = run(given)
            problem = not_finite(f"the {done} images", values(output))
            if problem is None:
                return output
            if precision(given) != torch.float32 and not can_be_float32(self._vae):
                raise ValueError(f"{problem}, and offloaded or quantized weights cannot be made float32; {_REMEDY}.")
        with in_float32([self._vae], given.device):
            output = run(given.float())
        still = not_finite(f"the {done} images", values(output))
        if still is not None:
            raise ValueError(f"{still}; check the VAE's weights, and the given latents or image.")
        if problem is not None:
            logger.warning(f"{problem}; they were {done} again in float32. To avoid the second run, {_REMEDY}.")
        return output


class _TakesAnyImages:
    """Mixed in before diffusers' VAE encoders: a `GuardedVAE`, and as many images as masks and generators.

    Images are encoded at the call's size, else at their own.
    """

    @torch.no_grad()
    def __call__(self: Any, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        self.get_block_state(state)  # refuses a missing image
        view, inner = guarded_vae(components), _match_images(state)
        if inner.get("padding_mask_crop") is None:
            inner.values.update(_target_size(components, state))
        if inner.get("soft_mask"):
            view.mask_processor = _soft(components.mask_processor)
        super().__call__(view, inner)  # type: ignore[misc]
        for output in self.intermediate_outputs:
            state.set(output.name, inner.get(output.name), output.kwargs_type)
        return components, state


class PeRFlowVaeEncoderStep(_TakesAnyImages, StableDiffusionXLVaeEncoderStep):
    """diffusers' VAE encoder with a `GuardedVAE`, and with a list of generators allowed for fewer images."""


class PeRFlowInpaintVaeEncoderStep(_TakesAnyImages, StableDiffusionXLInpaintVaeEncoderStep):
    """diffusers' VAE encoder for inpainting, at the image's own size unless the call names another.

    It does not encode the masked image for a 4-channel UNet, which does not take it. With `soft_mask` the mask's grey
    values are kept.
    """

    expected_components = declared(*StableDiffusionXLInpaintVaeEncoderStep().expected_components, unet_spec())
    inputs = declared(*StableDiffusionXLInpaintVaeEncoderStep().inputs, shared_input("soft_mask"))

    # The stock method of this class reads `self.vae` where the VAE has latent statistics, which no block has.
    _encode_vae_image = StableDiffusionXLVaeEncoderStep._encode_vae_image

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
    """A copy of the state with as many images as masks and generators, so that the stock blocks can pair them.

    A single mask stays as it is, since a crop needs it. Without `dtype` the stock blocks encode in the VAE's own type.
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
    """Height and width to encode the image at: the call's, else the image's own rounded down, with a warning."""
    image, processor = state.get("image"), components.image_processor
    given = dict(zip(("height", "width"), image_size(image), strict=True))
    wanted = {name: state.get(name) or size for name, size in given.items()}
    # With both given, the processor only rounds them down.
    target = dict(zip(wanted, processor.get_default_height_width(image, **wanted), strict=True))
    if any(state.get(name) is None and target[name] != given[name] for name in given):
        logger.warning(
            f"image is {given['width']}x{given['height']}, not a multiple of {processor.config.vae_scale_factor}; it "
            f"is resized to {target['width']}x{target['height']}. To choose another size, pass height and width."
        )
    return target


def _soft(processor: VaeImageProcessor) -> VaeImageProcessor:
    """A processor of masks like the pipeline's, which keeps grey values."""
    return VaeImageProcessor.from_config(processor.config, do_binarize=False)


def images_output() -> OutputParam:
    """The one output of every preset."""
    return OutputParam("images", Decoded, "The images, as `output_type` says; for `latent` the latents as they are.")


class PeRFlowKeepKnownPixelsStep(ModularPipelineBlocks):
    """Puts the pixels outside the mask back exactly: decoding known latents alone gives only nearly what they were."""

    model_name = "stable-diffusion-xl"
    description = "Puts the known pixels of an inpainted image back as they were; `keep_known_pixels=False` leaves it."
    expected_components = declared(
        *(
            replace(spec, description="Resizes images or masks.")
            for spec in StableDiffusionXLInpaintVaeEncoderStep().expected_components
            if spec.name != "vae"
        )
    )
    inputs = declared(
        param("images", Decoded, "The decoded images.", required=True),
        *shared_inputs("image", "mask_image", required=True),
        param("keep_known_pixels", bool, "Whether pixels outside the mask are put back exactly.", default=True),
        *shared_inputs("soft_mask", "output_type"),
    )
    intermediate_outputs = declared(OutputParam("images", Decoded, "The images, with the known pixels as given."))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        if block_state.keep_known_pixels and block_state.output_type != "latent":
            processor, masks = components.image_processor, components.mask_processor
            size = image_size(block_state.images)
            painted, known = (processor.preprocess(one, *size) for one in (block_state.images, block_state.image))
            hole = (_soft(masks) if block_state.soft_mask else masks).preprocess(block_state.mask_image, *size)
            known, hole = (repeat_images(one, len(painted)).to(painted) for one in (known, hole))
            blended = torch.lerp(known, painted, hole)
            block_state.images = processor.postprocess(blended, output_type=block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowDecodeStep(StableDiffusionXLDecodeStep):
    """diffusers' decoder with a `GuardedVAE`, whose type may be another than the latents'. Images are finite."""

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
