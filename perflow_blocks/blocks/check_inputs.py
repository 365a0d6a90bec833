"""The first block of a preset: finds a caller's mistakes before a model runs or a weight changes."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import nn

from ..schedulers.scheduling_perflow import NOISINGS
from .check_images import CONTROL_RANGE, IMAGES, check_controlnet, check_images, check_ip_adapters, require_shape
from .declare import declared
from .guiders import check_guider, guider_for_call
from .inputs import NONFINITE_POLICIES, OUTPUT_TYPES, REQUEST, TASKS, Size
from .precision import align_weights, computing_dtype
from .set_timesteps import check_denoising_range, check_strength
from .specs import guider_spec, unet_spec, vae_spec

logger = logging.get_logger(__name__)

NAMES = tuple(entry.name for entry in REQUEST)
ENCODERS = ("text_encoder", "text_encoder_2")
PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
SIZES = tuple(entry.name for entry in REQUEST if entry.type_hint == Size)
FLAGS = tuple(entry.name for entry in REQUEST if entry.type_hint is bool)
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
    "mask_image": ("image",),
    "soft_mask": ("mask_image",),
    "mask": ("image_latents",),
    "denoising_start": ("image_latents", "image"),
    **dict.fromkeys(("control_mode", "controlnet_conditioning_scale", "guess_mode"), ("control_image",)),
    **dict.fromkeys(CONTROL_RANGE, ("control_image",)),
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
        unet, guider = loaded["unet"], guider_for_call(loaded["guider"], request.guidance_scale)
        _forget_done_stages(request, blocks.sub_blocks)
        _check_loaded(loaded, request, blocks)
        given = {name for name in NAMES if getattr(request, name) is not None}
        for_task = [name for name in TASK_INPUTS if name in given]
        _check_combination(given)
        check_guider(guider)
        _check_settings(request, loaded)
        prompts = _check_prompts(request, components)
        images = prompts * request.num_images_per_prompt
        channels, factor = components.num_channels_latents, components.vae_scale_factor
        processor = None if request.image is None else loaded.get("image_processor")
        image_factor = 1 if processor is None else processor.config.vae_scale_factor
        _check_sizes(request, {"VAE": factor, "image processor": image_factor})
        if for_task:
            _check_task(for_task, [block for block in blocks.sub_blocks.values() if block is not self])
        if for_task or unet.config.in_channels != channels:
            check_images(request, prompts, images, channels, unet.config.in_channels, image_factor)
            check_controlnet(loaded.get("controlnet"), request, prompts)
        adapted = unet.config.encoder_hid_dim_type == "ip_image_proj"
        if for_task or adapted:
            adapters = list(unet.encoder_hid_proj.image_projection_layers) if adapted else []
            check_ip_adapters(adapters, request, "ip_adapter" in blocks.sub_blocks)
        for name in for_task:
            if name in IMAGES:  # the checks brought it to one form
                state.set(name, getattr(request, name))
        _check_generator(request, images)
        _check_latents(request, images, channels, factor)
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


def _check_settings(request: Any, loaded: Mapping[str, Any]) -> None:
    """Refuses unknown options, and numbers of another type or out of range."""
    for name, options in OPTIONS.items():
        if getattr(request, name) not in options:
            raise ValueError(f"{name}={getattr(request, name)!r} must be one of {', '.join(options)}.")
    for name in FLAGS:
        if not isinstance(getattr(request, name), (bool, type(None))):
            raise ValueError(f"{name}={getattr(request, name)!r} must be True, False or None.")
    for name, least in LEAST.items():
        value = getattr(request, name)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    if request.clip_skip is not None:
        layers = min((loaded[n].config.num_hidden_layers for n in ENCODERS if loaded.get(n) is not None), default=99)
        if request.clip_skip >= layers:
            raise ValueError(f"clip_skip={request.clip_skip} must be below {layers}, the layers of a text encoder.")
    value = request.cross_attention_kwargs
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f'cross_attention_kwargs={value!r} must be a dictionary, such as {{"scale": 0.5}}.')
    value = request.callback_on_step_end
    if value is not None and not callable(value):
        raise ValueError(f"callback_on_step_end={value!r} must be a function (pipe, step, timestep, callback_kwargs).")
    if request.strength is not None:
        check_strength(request.strength)
    if request.denoising_start is not None or request.denoising_end is not None:
        check_denoising_range(request.denoising_start, request.denoising_end)


def _check_prompts(request: Any, components: Any) -> int:
    """The number of prompts. Refuses missing prompts, and texts that do not match in number."""
    if request.prompt is None:
        if request.prompt_embeds is None:
            raise ValueError("prompt is missing; pass a text or a list of texts.")
        return _check_embeddings(request, components)
    count = len(request.prompt) if isinstance(request.prompt, list) else 1
    for name in PROMPTS:
        text = getattr(request, name)
        if text is None:
            continue
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(entry, str) for entry in texts):
            raise ValueError(f"{name}={text!r} must be a text or a list of at least one text.")
        if len(texts) != count and (isinstance(text, list) or name == "prompt_2"):
            raise ValueError(f"{name} holds {len(texts)} texts, but there are {count} prompts.")
    return count


def _check_embeddings(request: Any, components: Any) -> int:
    """The number of prompts. Refuses embeddings of another shape than the UNet takes."""
    width, pooled_width = _embedding_widths(components)
    rows: Any = "prompts"
    tokens: Any = "tokens"
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        embeds, pooled = getattr(request, name), name.replace("prompt", "pooled_prompt")
        if embeds is not None:
            require_shape(name, embeds, (rows, tokens, width))
            rows, tokens = embeds.shape[:2]
            require_shape(pooled, getattr(request, pooled), (rows, pooled_width))
    return int(rows)


def _embedding_widths(components: Any) -> tuple[Any, Any]:
    """The width of text embeddings and of pooled ones that the UNet takes; a word where it does not say."""
    config = components.unet.config
    width = config.cross_attention_dim if isinstance(config.cross_attention_dim, int) else "width"
    if config.addition_embed_type != "text_time":
        return width, "width"
    time_ids = 5 if components.config.get("requires_aesthetics_score") else 6  # the refiner gets a score, not a size
    return width, config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim


def _check_sizes(request: Any, factors: Mapping[str, int]) -> None:
    """Refuses a height or width that is not a multiple of the `factors`, by their owner; sizes that are not pairs."""
    common = math.lcm(*factors.values())
    for name in ("height", "width"):
        value = getattr(request, name)
        for owner, factor in factors.items():
            if value is not None and value % factor:
                nearest = max(common, round(value / common) * common)
                raise ValueError(
                    f"{name}={value} must be a multiple of the {owner}'s factor {factor}; pass {nearest}."
                )
    for name in SIZES:
        value = getattr(request, name)
        pair = isinstance(value, tuple) and len(value) == 2 and all(type(entry) in (int, float) for entry in value)
        if value is not None and not pair:
            raise ValueError(f"{name}={value!r} must be a tuple of two numbers, such as (1024, 1024).")


def _check_task(given: list[str], others: list[ModularPipelineBlocks]) -> None:
    """Warns of inputs that no other block of the pipeline takes. Refuses `strength` without an image."""
    taken = {name for block in others for name in block.input_names}
    for name in given:
        if name not in taken:
            logger.warning("%s is given, but no block of this pipeline takes it; it is ignored.", name)
    if "strength" in given and "strength" in taken and not {"image", "image_latents"} & set(given):
        raise ValueError("strength is given without an image; pass image or image_latents, or leave strength out.")


def _check_generator(request: Any, images: int) -> None:
    generator = request.generator
    entries = generator if isinstance(generator, list) else [generator]
    for entry in entries:
        if not isinstance(entry, (torch.Generator, type(None))):
            raise ValueError(f"generator is of type {type(entry).__name__}; pass a torch.Generator or a list of them.")
    if isinstance(generator, list) and len(generator) != images:
        raise ValueError(
            f"generator holds {len(generator)} generators for {images} images; pass {images}, or a single one."
        )


def _check_latents(request: Any, images: int, channels: int, factor: int) -> None:
    """Refuses latents of another shape, or of another size than `height` and `width`."""
    if request.latents is not None:
        require_shape("latents", request.latents, (images, channels, f"height/{factor}", f"width/{factor}"))
    for tensor in (entry for entry in (request.latents, request.image_latents) if entry is not None):
        for name, axis in (("height", -2), ("width", -1)):
            size, pixels = getattr(request, name), tensor.shape[axis] * factor
            if size not in (None, pixels):
                raise ValueError(f"{name}={size}, but the latents are of {pixels} pixels; pass {pixels} or neither.")


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
