"""The first block of a preset: finds a caller's mistakes before a model runs or a weight changes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..schedulers.scheduling_perflow import NOISINGS
from .declare import declared
from .finite_guard import align_weights
from .guiders import guider_for_call
from .images import IMAGES, check_controlnet, check_images, check_ip_adapters, require_shape
from .inputs import NONFINITE_POLICIES, OUTPUT_TYPES, REQUEST
from .set_timesteps import check_denoising_range, check_strength
from .specs import guider_spec, unet_spec, vae_spec

NAMES = tuple(entry.name for entry in REQUEST)
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")

OPTIONS = {"output_type": OUTPUT_TYPES, "noising": NOISINGS, "on_nonfinite": NONFINITE_POLICIES}

LEAST = {"num_inference_steps": 1, "num_images_per_prompt": 1, "height": 1, "width": 1, "clip_skip": 0}
LEAST |= {"padding_mask_crop": 0, "batch_size": 1}
"""The least value of each integer."""

ENCODED = {
    "text_encoder": (PROMPTS, EMBEDDINGS),
    "ip_adapter": (("ip_adapter_image",), ("ip_adapter_embeds",)),
    "vae_encoder": (("image", "mask_image", "padding_mask_crop"), ("image_latents",)),
}
"""The blocks of a preset that encode: what each takes, and what may be given in its place."""

CONTROL_SETTINGS = ("control_guidance_start", "control_guidance_end", "controlnet_conditioning_scale", "guess_mode")

POOLED = (
    (("prompt_embeds",), ("pooled_prompt_embeds",)),
    (("negative_prompt_embeds",), ("negative_pooled_prompt_embeds",)),
    (("negative_pooled_prompt_embeds",), ("negative_prompt_embeds",)),
)
NEEDS = (
    (("negative_prompt_2",), ("negative_prompt",)),
    (("negative_original_size",), ("negative_target_size",)),
    (("negative_target_size",), ("negative_original_size",)),
    (("strength", "denoising_start"), ("image", "image_latents")),
    (("mask_image",), ("image",)),
    (("soft_mask", "padding_mask_crop"), ("mask_image",)),
    (("mask",), ("image_latents",)),
    (("control_mode", *CONTROL_SETTINGS), ("control_image",)),
)
"""Inputs on the left work only together with one of those on the right; `POOLED` for SDXL alone."""


class PeRFlowCheckInputsStep(ModularPipelineBlocks):
    """Checks what the caller asks for, makes this call's guider, and turns NumPy's numbers into Python's.

    As the first block it also gives the pipeline its default guider and the descriptions of its inputs.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """

    model_name = "stable-diffusion-xl"
    description = "Checks the request before anything expensive runs: one clear error for each mistake."
    expected_components = declared(guider_spec(), unet_spec(), vae_spec())
    inputs = declared(*REQUEST)
    intermediate_outputs = declared(
        OutputParam("guider", BaseGuidance, "This call's guider: a copy of the component, with `guidance_scale`.")
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        request = self.get_block_state(state)
        if components.config.get("_blocks_class_name"):  # saved, it would load as stock blocks in silence
            components.register_to_config(_blocks_class_name=None)
        _use_python_numbers(request, state)
        loaded, blocks = components.components, components._blocks
        guider = guider_for_call(loaded["guider"], request.guidance_scale)
        _check_encoded(request, blocks.sub_blocks)
        is_refiner = components.config.get("requires_aesthetics_score", False)
        _check_loaded(loaded, request, blocks.sub_blocks, is_refiner)
        given = {name for name in NAMES if getattr(request, name) is not None}
        _check_combination(given, loaded["unet"].config.addition_embed_type is not None)
        check_settings(request)
        prompts = _check_prompts(request, loaded["unet"].config, is_refiner)
        images = prompts * request.num_images_per_prompt
        channels, factor = components.num_channels_latents, components.vae_scale_factor
        _check_size(request, images, channels, factor)
        check_images(request, prompts, images, channels)
        check_controlnet(loaded.get("controlnet"), request, prompts)
        check_ip_adapters(loaded["unet"], request)
        for name in given.intersection(IMAGES):  # the checks brought it to one form
            state.set(name, getattr(request, name))
        for model in loaded.values():
            if isinstance(model, nn.Module):
                align_weights(model)
        state.set("guider", guider)
        return components, state


def _use_python_numbers(request: Any, state: PipelineState) -> None:
    """Converts NumPy's numbers to Python's, in the request and for later blocks."""
    for name in NAMES:
        value = getattr(request, name)
        if any(isinstance(leaf, np.generic) for leaf in tree_leaves(value)):
            value = tree_map_only(np.generic, np.generic.item, value)
            setattr(request, name, value)
            state.set(name, value)


def _check_loaded(loaded: Mapping[str, Any], request: Any, blocks: Container[str], is_refiner: bool) -> None:
    """Refuses a request if a component that it needs is missing. A refiner has the second text encoder alone."""
    text, decodes = request.prompt is not None, "decode" in blocks and request.output_type != "latent"
    needed = {
        "unet": True,
        "text_encoder": text and not is_refiner,
        "tokenizer": text and not is_refiner,
        "text_encoder_2": text,
        "tokenizer_2": text,
        "vae": decodes or ("vae_encoder" in blocks and request.image is not None),
        "controlnet": request.control_image is not None,
        "image_encoder": request.ip_adapter_image is not None,
        "feature_extractor": request.ip_adapter_image is not None,
    }
    missing = [name for name, needs in needed.items() if needs and name in loaded and loaded[name] is None]
    if missing:
        names = " and ".join(missing)
        raise ValueError(f"{names} not loaded; call pipe.load_components() and read its warnings, or set {names}.")


def _check_encoded(request: Any, blocks: Container[str]) -> None:
    """Refuses inputs beside those that replace them.

    Where the blocks do not encode, the state of another pipeline may hold both: what was encoded counts.
    """
    for stage, groups in ENCODED.items():
        given = [next((name for name in names if getattr(request, name) is not None), None) for names in groups]
        if None in given:
            continue
        if stage in blocks:
            raise ValueError(f"{given[0]} and {given[1]} are both given; leave one out.")
        vars(request).update(dict.fromkeys(groups[0]))


def _check_combination(given: set[str], is_sdxl: bool) -> None:
    """Refuses inputs without those that they need."""
    for names, needed in (*POOLED, *NEEDS) if is_sdxl else NEEDS:
        name = next((name for name in names if name in given), None)
        if name and given.isdisjoint(needed):
            wanted = " or ".join(needed)
            raise ValueError(f"{name} is given without {wanted}; pass {wanted}, or leave {name} out.")


def check_settings(request: Any) -> None:
    """Refuses unknown options, and integers of another type or out of range, of those that the request has."""
    given = vars(request)
    for name, options in OPTIONS.items():
        if given.get(name, options[0]) not in options:
            raise ValueError(f"{name}={given[name]!r} must be one of {', '.join(options)}.")
    for name, least in LEAST.items():
        value = given.get(name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    if given.get("strength") is not None:
        check_strength(request.strength)
    check_denoising_range(given.get("denoising_start"), given.get("denoising_end"))


def _check_prompts(request: Any, unet_config: Any, is_refiner: bool) -> int:
    """The number of prompts. Refuses missing prompts, and texts or embeddings that do not match."""
    if request.prompt_embeds is not None:
        return _check_embeddings(request, unet_config, is_refiner)
    if request.prompt is None or request.prompt == []:
        raise ValueError("prompt is missing; pass a text or a list of at least one text.")
    count = len(request.prompt) if isinstance(request.prompt, list) else 1
    for name in PROMPTS:
        text = getattr(request, name)
        texts = len(text) if isinstance(text, list) else 1
        if texts != count and (isinstance(text, list) or (name == "prompt_2" and text is not None)):
            raise ValueError(f"{name} holds {texts} texts, but there are {count} prompts.")
    return count


def _check_embeddings(request: Any, unet_config: Any, is_refiner: bool) -> int:
    """The number of prompts. Refuses embeddings of another shape than the UNet takes."""
    time_ids = 5 if is_refiner else 6  # a score in place of a size
    width = unet_config.cross_attention_dim
    is_sdxl, pooled_width = unet_config.addition_embed_type is not None, 0
    if is_sdxl:
        pooled_width = unet_config.projection_class_embeddings_input_dim
        pooled_width -= time_ids * unet_config.addition_time_embed_dim
    rows: Any = "prompts"
    tokens: Any = "tokens"
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, pooled = getattr(request, name), name.replace("prompt", "pooled_prompt")
        if embeds is not None:
            require_shape(name, embeds, (rows, tokens, width))
            rows, tokens = embeds.shape[:2]
            if is_sdxl:
                require_shape(pooled, getattr(request, pooled), (rows, pooled_width))
    return int(rows)


def _check_size(request: Any, images: int, channels: int, factor: int) -> None:
    """Refuses sizes that are not multiples of the VAE's factor, and generators or latents that do not match."""
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is not None and value % factor:
            nearest = max(factor, round(value / factor) * factor)
            raise ValueError(f"{name}={value} must be a multiple of the VAE's factor {factor}; pass {nearest}.")
    if request.latents is not None:
        require_shape("latents", request.latents, (images, channels, f"height/{factor}", f"width/{factor}"))
    for tensor in (entry for entry in (request.latents, request.image_latents) if entry is not None):
        for name, axis in (("height", -2), ("width", -1)):
            size, pixels = getattr(request, name), tensor.shape[axis] * factor
            if size not in (None, pixels):
                raise ValueError(f"{name}={size}, but the latents are of {pixels} pixels; pass {pixels} or neither.")
    generators = request.generator
    if isinstance(generators, list) and len(generators) != images:
        raise ValueError(f"generator holds {len(generators)} generators for {images} images; pass {images}, or one.")
