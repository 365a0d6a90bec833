"""The inputs of blocks that more than one block takes, each defined once.

Functions return new `InputParam` objects, because diffusers writes into those that a block returns. In shapes, `f` is
the VAE's factor between pixels and latents, 8 for SDXL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from PIL import Image
from torch import Tensor

from ..core.step_plan import EarlierStep, StepPlan
from ..delta.recipe import DeltaRecipe
from ..schedulers.scheduling_perflow import NOISINGS

DENOISER_INPUT_FIELDS = "denoiser_input_fields"
"""The name under which diffusers collects the tensors that the guider splits."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NONFINITE_POLICIES = ("raise", "fallback")

Text = str | list[str]
Size = tuple[int, int]
Numbers = float | list[float]
Tensors = Tensor | list[Tensor]
OneImage = Image.Image | np.ndarray | Tensor
Images = OneImage | list[OneImage]


def param(name: str, type_hint: Any, description: str, **options: Any) -> InputParam:
    """An input; `options` are `required`, `default` and `kwargs_type` of `InputParam`."""
    return InputParam(name, type_hint=type_hint, description=description, **options)


_guided = partial(param, kwargs_type=DENOISER_INPUT_FIELDS)
_control = partial(param, kwargs_type="controlnet_kwargs")

REQUEST = (
    param("prompt", Text, "What to draw: a text, or a list with one text for each image."),
    param("prompt_2", Text, "The text for the second text encoder, if not `prompt`; unused if it is the only one."),
    param("negative_prompt", Text, "What not to draw; has no effect while the guidance scale is 1."),
    param("negative_prompt_2", Text, "The negative text for the second text encoder, if not `negative_prompt`."),
    _guided("prompt_embeds", Tensor, "Text embeddings (prompts, tokens, width), in place of `prompt`."),
    _guided("pooled_prompt_embeds", Tensor, "Pooled text embeddings (prompts, width) of `prompt_embeds`."),
    _guided("negative_prompt_embeds", Tensor, "Text embeddings of the negative prompt, like `prompt_embeds`."),
    _guided("negative_pooled_prompt_embeds", Tensor, "Pooled embeddings of `negative_prompt_embeds`."),
    param("clip_skip", int, "Last layers of the text encoders to skip, at least 0. None: SDXL's default."),
    param("cross_attention_kwargs", dict[str, Any], "Arguments for attention processors, such as a LoRA scale."),
    param("guidance_scale", float, "Guidance scale of this call, at least 0; 0 to 1 is none. None: the guider's own."),
    param("num_inference_steps", int, "Denoising steps, usually 4 to 8. None: as the weights recommend, else 6."),
    param(
        "timesteps",
        list[int] | Tensor,
        "Timesteps (num_steps,) in place of a number, descending, with every window start.",
    ),
    param("denoising_end", float, "Fraction of the denoising, in (0, 1], to stop at, snapped to a window boundary."),
    param("num_images_per_prompt", int, "Images for each prompt, at least 1.", default=1),
    param("generator", torch.Generator | list[torch.Generator], "Source of the noise: one, or one for each image."),
    param("latents", Tensor, "Latents (images, channels, height/f, width/f): starting noise, or those of this step."),
    param(
        "callback_on_step_end",
        Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None],
        'Called as `callback(pipe, step, timestep, {"latents": latents})` after each step; may return other latents.',
    ),
    param("output_type", str, f"What images are returned as: {', '.join(OUTPUT_TYPES)}.", default="pil"),
    param("on_nonfinite", str, "If latents are not finite: raise, or fallback (again in float32).", default="raise"),
    # for image-to-image and inpainting, ControlNets and IP-Adapters
    param("image", Images, "The image to start from: one for all prompts, or one for each. PIL, or values in [0, 1]."),
    param(
        "mask_image",
        Images,
        "For inpainting, of the image's size: white is painted, black kept; grey counts as white from one half on. If "
        "its transparency varies, that is the mask, with what is opaque painted.",
    ),
    param("soft_mask", bool, "Whether grey values of `mask_image` blend old and new. None: no."),
    param("padding_mask_crop", int, "Paint at full size only the mask with this margin in pixels; PIL images only."),
    param("image_latents", Tensor, "Clean latents of the image (n, channels, height/f, width/f)."),
    param("mask", Tensor, "The mask at the latents' size (n, 1, height/f, width/f): 1 is painted, 0 kept."),
    param("masked_image_latents", Tensor, "For a 9-channel UNet: latents of the image without its hole."),
    param(
        "strength",
        float,
        "Time in (0, 1] at which the image enters: 1 redraws everything, small values little. A first step starts "
        "there, then come the steps below it. None: 0.3 for image-to-image, 1.0 for inpainting.",
    ),
    param(
        "noising", str, f"How images are noised: {' or '.join(NOISINGS)}; trained with the first.", default=NOISINGS[0]
    ),
    param(
        "denoising_start",
        float,
        "Fraction of the denoising, in (0, 1), that an earlier run did, snapped to a window boundary: no noise is "
        "added, and the steps before it are skipped. Not for inpainting.",
    ),
    param("control_image", Images, "For a ControlNet: the control image, or a list for several of them."),
    param("control_mode", int | list[int], "For a ControlNet-Union: the control type of each control image."),
    param("controlnet_conditioning_scale", Numbers, "Weight of the ControlNet, or of each. None: 1."),
    param("control_guidance_start", Numbers, "Fraction of the steps, in [0, 1), where ControlNets begin. None: 0."),
    param("control_guidance_end", Numbers, "Fraction of the steps, in (0, 1], where ControlNets end. None: 1."),
    param("guess_mode", bool, "Whether the ControlNet sees the conditional batches only. None: no."),
    param("ip_adapter_image", Images, "For IP-Adapters: an image, or a list with one or more images for each."),
    _guided("ip_adapter_embeds", list[Tensor], "Image embeddings, one tensor for each loaded IP-Adapter."),
    _guided("negative_ip_adapter_embeds", list[Tensor], "Embeddings of the empty image, likewise."),
    # sizes
    param("height", int, "Height in pixels, a multiple of f. None: the given image's, else the UNet's own."),
    param("width", int, "Width in pixels, a multiple of f. None: the given image's, else the UNet's own."),
    param("original_size", Size, "Size before cropping that SDXL is told, (height, width). None: the image's."),
    param("aesthetic_score", float, "For SDXL's refiner: how pleasing the image should be.", default=6.0),
    param("negative_aesthetic_score", float, "`aesthetic_score` of the negative prompt.", default=2.0),
    param("target_size", Size, "Size wanted that SDXL is told, (height, width). None: the image's."),
    param("crops_coords_top_left", Size, "Where the crop began that SDXL is told, (top, left).", default=(0, 0)),
    param("negative_original_size", Size, "`original_size` of the negative prompt; needs `negative_target_size`."),
    param("negative_target_size", Size, "`target_size` of the negative prompt; needs `negative_original_size`."),
    param("negative_crops_coords_top_left", Size, "`crops_coords_top_left` of the negative prompt.", default=(0, 0)),
)
"""What a call may be given, in the order in which a preset's documentation lists it."""

_HANDED_ON = (
    param("guider", BaseGuidance, "This call's guider, from `check_inputs`. None: a copy of the component."),
    param("batch_size", int, "Number of prompts."),
    param("dtype", torch.dtype, "Type of the latents, from the `input` step."),
    param("merged_deltas", tuple[Any, ...], "What `merge_delta` found or put in the UNet for this call."),
    param("delta_recipe", DeltaRecipe, "How the merged delta was distilled, from `merge_delta`; None without one."),
    param("step_plan", StepPlan, "The steps on the host: times, windows, coefficients."),
    param("step_coefficients", Tensor, "The plan's table (num_steps, 4) on the device, float32."),
    param("earlier_step", EarlierStep, "What the solver kept of the step before, where it is of second order."),
    param("noise_coefficients", Tensor, "(P, Q) of `P x0 + Q noise` at each step and the end (num_steps + 1, 2)."),
    param("noise_pred", Tensor, "Guided prediction of this step, shaped like the latents."),
    param("noise", Tensor, "The noise of the known part, shaped like the latents."),
    param("inpaint_conditioning", Tensor, "Mask and masked image (images, 5, height/f, width/f), for 9 channels."),
    _guided("add_time_ids", Tensor, "Sizes and crop (images, 6) that SDXL is told."),
    _guided("negative_add_time_ids", Tensor, "Sizes and crop of the negative prompt."),
    param("controlnet_cond", Tensors, "Control images (images, 3, height, width) in [0, 1]; a list for several."),
    param("conditioning_scale", Numbers, "Weight of the ControlNet, or of each of several."),
    param("controlnet_keep", list[float] | list[list[float]], "1 or 0 for each step: in force or not."),
    _control("control_type", Tensor, "For a ControlNet-Union: which control types are given (images, types)."),
    _control("control_type_idx", list[int], "For a ControlNet-Union: the control type of each control image."),
)
"""What blocks of a preset hand to later ones."""

_SHARED = {entry.name: entry for entry in (*REQUEST, *_HANDED_ON)}


def shared_input(name: str, *, required: bool = False, default: Any = None) -> InputParam:
    """A new copy of the definition of an input, with another default if one is given."""
    entry = _SHARED[name]
    return replace(entry, required=required, default=entry.default if default is None else default)


def shared_inputs(*names: str, required: bool = False) -> list[InputParam]:
    """New copies of the definitions of several inputs."""
    return [shared_input(name, required=required) for name in names]


def guided_inputs(*names: str, required: bool = True) -> list[InputParam]:
    """Several inputs, each with its `negative_` one, which the guider's unconditional batch gets."""
    pairs = [(shared_input(name, required=required), shared_input(f"negative_{name}")) for name in names]
    return [entry for pair in pairs for entry in pair]


def as_outputs(entries: Iterable[InputParam]) -> list[OutputParam]:
    """Outputs of the same names, for blocks that hand on what they take."""
    return [OutputParam(one.name, one.type_hint, one.description, kwargs_type=one.kwargs_type) for one in entries]
