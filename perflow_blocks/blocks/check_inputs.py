"""The first block of a preset: finds a caller's mistakes before a model runs or a weight changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam

from ..components.specs import guider_spec, unet_spec, vae_spec
from ..core.windows import require_positive_int

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROMPT_NAMES = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")

Text = str | list[str]
Size = tuple[int, int]


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
        return [*_prompt_inputs(), *_sampling_inputs(), *_size_inputs()]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        request = self.get_block_state(state)
        _check_loaded(components, request.output_type)
        _check_embeddings(components, request)
        _check_sampling(components, request)
        num_images = _count_prompts(request) * request.num_images_per_prompt
        _check_generator(request.generator, num_images)
        _check_size(request, components.vae_scale_factor)
        if request.latents is not None:
            _check_latents(request.latents, (num_images, components.num_channels_latents))
        return components, state


def _param(name: str, type_hint: Any, description: str, default: Any = None) -> InputParam:
    return InputParam(name, type_hint=type_hint, description=description, default=default)


def _prompt_inputs() -> list[InputParam]:
    return [
        _param("prompt", Text, "What to draw: a text, or a list of texts for as many pictures."),
        _param("prompt_2", Text, "The text for the second text encoder, if not `prompt`."),
        _param("negative_prompt", Text, "What not to draw; has no effect while the guidance scale is 1."),
        _param("negative_prompt_2", Text, "The negative text for the second encoder, if not `negative_prompt`."),
        _param("prompt_embeds", torch.Tensor, "In place of `prompt`, once the `text_encoder` block was taken out."),
        _param("clip_skip", int, "Last layers of the text encoders to leave out, at least 0. None: SDXL's way."),
        _param("cross_attention_kwargs", dict[str, Any], "Arguments for attention processors, such as a LoRA scale."),
    ]


def _sampling_inputs() -> list[InputParam]:
    return [
        _param(
            "num_inference_steps", int, "Denoising steps, 4 to 8 as a rule. None: as the weights recommend, else 6."
        ),
        _param("timesteps", list[int], "In place of a number of steps: descending, with every window start."),
        _param("num_images_per_prompt", int, "Pictures for each prompt, at least 1.", 1),
        _param("generator", torch.Generator | list[torch.Generator], "Source of the noise: one, or one per picture."),
        _param("latents", torch.Tensor, "Starting noise (pictures, channels, height/f, width/f), f the VAE's factor."),
        _param("output_type", str, f"What the pictures are returned as: {', '.join(OUTPUT_TYPES)}.", "pil"),
    ]


def _size_inputs() -> list[InputParam]:
    told = "that SDXL is told, (height, width) in pixels"
    return [
        _param("height", int, "Height in pixels, a multiple of the VAE's factor. None: the UNet's own."),
        _param("width", int, "Width in pixels, a multiple of the VAE's factor. None: the UNet's own."),
        _param("original_size", Size, f"Size before cropping {told}. None: the picture's."),
        _param("target_size", Size, f"Size wanted {told}. None: the picture's."),
        _param("crops_coords_top_left", Size, "Where the crop began that SDXL is told, (top, left).", (0, 0)),
        _param(
            "negative_original_size",
            Size,
            "`original_size` for the negative prompt; goes with `negative_target_size`.",
        ),
        _param(
            "negative_target_size", Size, "`target_size` for the negative prompt; goes with `negative_original_size`."
        ),
        _param("negative_crops_coords_top_left", Size, "`crops_coords_top_left` of the negative prompt.", (0, 0)),
    ]


def _check_loaded(components: Any, output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is unknown; pass one of {', '.join(OUTPUT_TYPES)}.")
    missing = set(components.null_component_names) - {"scheduler"}  # which the window set-up makes
    if output_type == "latent":
        missing -= {"vae"}
    if {"text_encoder", "tokenizer"} <= missing:  # SDXL's refiner has the second encoder only
        missing -= {"text_encoder", "tokenizer"}
    if missing:
        names = " and ".join(sorted(missing))
        raise ValueError(f"{names} not loaded; call pipe.load_components() and look at its warnings.")


def _check_embeddings(components: Any, request: Any) -> None:
    if request.prompt is None and request.prompt_embeds is not None and "text_encoder" in _block_names(components):
        raise ValueError(
            "prompt_embeds cannot replace prompt while the pipeline encodes prompts itself; "
            'build it from blocks without that step: blocks.sub_blocks.pop("text_encoder").'
        )


def _block_names(components: Any) -> set[str]:
    return set(components._blocks.sub_blocks)


def _check_sampling(components: Any, request: Any) -> None:
    for name in ("num_inference_steps", "num_images_per_prompt"):
        if getattr(request, name) is not None:
            require_positive_int(name, getattr(request, name))
    if request.clip_skip is not None and (not isinstance(request.clip_skip, int) or request.clip_skip < 0):
        raise ValueError(f"clip_skip={request.clip_skip!r} is no whole number of at least 0; leave it out.")
    # Guiders keep their settings as plain attributes, which users set too, so the config alone would miss some.
    for name, value in vars(components.guider).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the guider's {name}={value} is not finite; set a number, such as 2.0.")


def _count_prompts(request: Any) -> int:
    """The number of prompts; every other list of texts must be as long."""
    if request.prompt is None and request.prompt_embeds is None:
        raise ValueError("prompt is missing; pass a text or a list of texts.")
    texts = {name: getattr(request, name) for name in PROMPT_NAMES if getattr(request, name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(t, str) for t in text)):
            raise ValueError(f"{name} is {_kind(text)}; pass a text or a list of texts.")
        if not isinstance(text, str) and not text:
            raise ValueError(f"{name} is an empty list; pass at least one text.")
    count = _length(request.prompt) if request.prompt is not None else request.prompt_embeds.shape[0]
    for name, text in texts.items():
        if (not isinstance(text, str) or name == "prompt_2") and _length(text) != count:
            raise ValueError(f"{name} holds {_length(text)} texts for {count} prompts; pass one for each prompt.")
    return count


def _length(text: Text) -> int:
    return 1 if isinstance(text, str) else len(text)


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list that holds " + ", ".join(sorted({type(entry).__name__ for entry in value}))
    return f"of type {type(value).__name__}"


def _check_generator(generator: object, num_images: int) -> None:
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"{len(generator)} generators for {num_images} pictures; pass one, or one for each picture.")


def _check_size(request: Any, factor: int) -> None:
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is None:
            continue
        require_positive_int(name, value)
        if value % factor:
            nearest = max(factor, round(value / factor) * factor)
            raise ValueError(f"{name}={value} is no multiple of the VAE's factor {factor}; pass {nearest}.")
    if (request.negative_original_size is None) != (request.negative_target_size is None):
        raise ValueError("only one of negative_original_size and negative_target_size is given; pass both or neither.")


def _check_latents(latents: torch.Tensor, expected: Sequence[int]) -> None:
    if latents.ndim != 4 or tuple(latents.shape[:2]) != tuple(expected):
        pictures, channels = expected
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; for {pictures} pictures pass "
            f"({pictures}, {channels}, height/f, width/f)."
        )
