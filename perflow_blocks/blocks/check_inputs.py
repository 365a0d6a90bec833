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

from ..schedulers.scheduling_perflow import NOISINGS
from .declare import declared
from .finite_guard import align_weights, computing_dtype
from .guiders import check_guider, guider_for_call
from .images import IMAGES, IP_ADAPTER_INPUTS, check_controlnet, check_images, check_ip_adapters, require_shape
from .inputs import NONFINITE_POLICIES, OUTPUT_TYPES, REQUEST, TASKS
from .set_timesteps import check_denoising_range, check_strength
from .specs import guider_spec, unet_spec, vae_spec

NAMES = tuple(entry.name for entry in REQUEST)
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
TASK_INPUTS = tuple(entry.name for entry in TASKS if entry.default is None)

OPTIONS = {"output_type": OUTPUT_TYPES, "noising": NOISINGS, "on_nonfinite": NONFINITE_POLICIES}

LEAST = {
    "num_inference_steps": 1,
    "num_images_per_prompt": 1,
    "height": 1,
    "width": 1,
    "clip_skip": 0,
    "padding_mask_crop": 0,
}
"""The least value of each integer."""

EXCLUSIVE = ((PROMPTS, EMBEDDINGS), (("image",), ("image_latents",)), (("ip_adapter_image",), ("ip_adapter_embeds",)))
"""Inputs on one side replace those on the other."""

NEEDS = {
    "negative_prompt_2": ("negative_prompt",),
    "prompt_embeds": ("pooled_prompt_embeds",),
    "negative_prompt_embeds": ("negative_pooled_prompt_embeds",),
    "negative_pooled_prompt_embeds": ("negative_prompt_embeds",),
    "negative_original_size": ("negative_target_size",),
    "negative_target_size": ("negative_original_size",),
    "strength": ("image", "image_latents"),
    "mask_image": ("image",),
    "soft_mask": ("mask_image",),
    "mask": ("image_latents",),
    "padding_mask_crop": ("mask_image",),
    "denoising_start": ("image_latents", "image"),
    "control_mode": ("control_image",),
    "control_guidance_start": ("control_image",),
    "control_guidance_end": ("control_image",),
    "controlnet_conditioning_scale": ("control_image",),
    "guess_mode": ("control_image",),
}
"""Inputs that work only together with one of the others."""

STAGES = {
    "text_encoder": ("prompt_embeds", PROMPTS),
    "ip_adapter": ("ip_adapter_embeds", ("ip_adapter_image",)),
    "vae_encoder": ("image_latents", ("image", "mask_image", "padding_mask_crop")),
}
"""The blocks of a preset that encode: what each makes, and of what."""


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
        _forget_done_stages(request, blocks.sub_blocks)
        _check_loaded(loaded, request, blocks)
        given = {name for name in NAMES if getattr(request, name) is not None}
        _check_combination(given)
        check_guider(guider)
        _check_settings(request)
        prompts = _check_prompts(request, components)
        images = prompts * request.num_images_per_prompt
        channels, factor = components.num_channels_latents, components.vae_scale_factor
        _check_size(request, images, channels, factor)
        if not given.isdisjoint(TASK_INPUTS):
            check_images(request, prompts, images, channels)
            check_controlnet(loaded.get("controlnet"), request, prompts)
        unet = loaded["unet"]
        adapted = unet.config.encoder_hid_dim_type == "ip_image_proj"
        if adapted or not given.isdisjoint(IP_ADAPTER_INPUTS):
            check_ip_adapters(len(unet.encoder_hid_proj.image_projection_layers) if adapted else 0, request)
        for name in given.intersection(IMAGES):  # the checks brought it to one form
            state.set(name, getattr(request, name))
        _check_dtypes(loaded, request)
        for model in loaded.values():
            if isinstance(model, nn.Module):
                align_weights(model)
        state.set("guider", guider)
        return components, state


def _use_python_numbers(request: Any, state: PipelineState) -> None:
    """Converts NumPy's numbers to Python's, in the request and for later blocks."""
    for name in NAMES:
        value = getattr(request, name)
        entries = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(entry, np.generic) for entry in entries):
            numbers = [entry.item() if isinstance(entry, np.generic) else entry for entry in entries]
            value = type(value)(numbers) if entries is value else numbers[0]
            setattr(request, name, value)
            state.set(name, value)


def _forget_done_stages(request: Any, blocks: Container[str]) -> None:
    """Drops from the request what another pipeline encoded already: a state that is handed on holds both."""
    for stage, (made, sources) in STAGES.items():
        if stage not in blocks and getattr(request, made) is not None:
            for name in sources:
                setattr(request, name, None)


def _check_loaded(loaded: Mapping[str, Any], request: Any, blocks: Any) -> None:
    """Refuses a request if an image or a component that the workflow needs is missing."""
    required = blocks.required_inputs
    for name in ("image", "mask_image", "control_image", "control_mode", "ip_adapter_image"):
        if name in required and getattr(request, name) is None:
            raise ValueError(f"{name} is missing, and this workflow needs it; pass {name}=.")
    text, decodes = request.prompt is not None, "decode" in blocks.sub_blocks and request.output_type != "latent"
    unet: Any = loaded["unet"]
    second: Any = loaded.get("text_encoder_2")
    # SDXL's refiner has the second text encoder alone, and its UNet is as wide as that.
    refiner = None not in (unet, second) and unet.config.cross_attention_dim == second.config.hidden_size
    needed = {
        "unet": True,
        "text_encoder": text and not refiner,
        "tokenizer": text and not refiner,
        "text_encoder_2": text,
        "tokenizer_2": text,
        "vae": decodes or ("vae_encoder" in blocks.sub_blocks and request.image is not None),
        "controlnet": request.control_image is not None,
        "image_encoder": request.ip_adapter_image is not None,
        "feature_extractor": request.ip_adapter_image is not None,
    }
    missing = [name for name, needs in needed.items() if needs and name in loaded and loaded[name] is None]
    if missing:
        names = " and ".join(missing)
        raise ValueError(f"{names} not loaded; call pipe.load_components() and read its warnings, or set {names}.")


def _check_combination(given: set[str]) -> None:
    """Refuses inputs beside those that replace them, or without those that they need."""
    for these, those in EXCLUSIVE:
        one, other = (next((name for name in names if name in given), None) for names in (these, those))
        if one and other:
            raise ValueError(f"{one} and {other} are both given; leave one out.")
    for name, needed in NEEDS.items():
        if name in given and given.isdisjoint(needed):
            wanted = " or ".join(needed)
            raise ValueError(f"{name} is given without {wanted}; pass {wanted}, or leave {name} out.")


def _check_settings(request: Any) -> None:
    """Refuses unknown options, and numbers of another type or out of range."""
    for name, options in OPTIONS.items():
        if getattr(request, name) not in options:
            raise ValueError(f"{name}={getattr(request, name)!r} must be one of {', '.join(options)}.")
    for name, least in LEAST.items():
        value = getattr(request, name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    if request.strength is not None:
        check_strength(request.strength)
    check_denoising_range(request.denoising_start, request.denoising_end)


def _check_prompts(request: Any, components: Any) -> int:
    """The number of prompts. Refuses missing prompts, and texts or embeddings that do not match."""
    if request.prompt_embeds is not None:
        return _check_embeddings(request, components)
    if request.prompt is None or request.prompt == []:
        raise ValueError("prompt is missing; pass a text or a list of at least one text.")
    count = len(request.prompt) if isinstance(request.prompt, list) else 1
    for name in PROMPTS:
        text = getattr(request, name)
        texts = len(text) if isinstance(text, list) else 1
        if texts != count and (isinstance(text, list) or (name == "prompt_2" and text is not None)):
            raise ValueError(f"{name} holds {texts} texts, but there are {count} prompts.")
    return count


def _check_embeddings(request: Any, components: Any) -> int:
    """The number of prompts. Refuses embeddings of another shape than the UNet takes."""
    config = components.unet.config
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else "width"
    pooled_width: Any = "width"
    if config.addition_embed_type == "text_time":
        time_ids = 5 if components.config.get("requires_aesthetics_score") else 6  # a score in place of a size
        pooled_width = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
    rows: Any = "prompts"
    tokens: Any = "tokens"
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, pooled = getattr(request, name), name.replace("prompt", "pooled_prompt")
        if embeds is not None:
            require_shape(name, embeds, (rows, tokens, width))
            rows, tokens = embeds.shape[:2]
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


def _check_dtypes(loaded: Mapping[str, Any], request: Any) -> None:
    """Refuses a model or a tensor of another type than the UNet, if the two meet. The VAE's type is its own."""
    weight = next(loaded["unet"].parameters())
    if weight.device.type != "meta" and torch.is_autocast_enabled(weight.device.type):  # "meta": offloaded by layer
        return
    dtype = computing_dtype(loaded["unet"])
    for name, given in (("text_encoder_2", request.prompt), ("controlnet", request.control_image)):
        model = None if given is None else loaded.get(name)
        kind = dtype if model is None else computing_dtype(model)
        if kind != dtype:
            raise ValueError(f"{name} is {kind}, the UNet {dtype}; call load_components(dtype={dtype}).")
    for name in (*EMBEDDINGS, "latents"):
        tensor = getattr(request, name)
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype}, the UNet {dtype}; pass {name}.to({dtype}).")
