"""What a call of a preset may be given for its task: the inputs that its first block checks and describes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from PIL import Image

from .inputs import (
    DENOISER_INPUT_FIELDS,
    denoising_end_input,
    denoising_start_input,
    generator_input,
    noising_input,
    num_images_per_prompt_input,
    on_nonfinite_input,
    output_type_input,
    param,
)

Text = str | list[str]
Size = tuple[int, int]
Picture = Image.Image | np.ndarray | torch.Tensor
Pictures = Picture | list[Picture]


def request_inputs() -> list[InputParam]:
    """In the order in which a preset's documentation lists them; blocks such as `merge_delta` add their own."""
    return [
        *_prompt_inputs(),
        *_sampling_inputs(),
        *_picture_inputs(),
        *_control_inputs(),
        *_size_inputs(),
    ]


def _prompt_inputs() -> list[InputParam]:
    return [
        param("prompt", Text, "What to draw: a text, or a list of texts for as many pictures."),
        param(
            "prompt_2",
            Text,
            "The text for the second text encoder, if not `prompt`; has no effect where it is the only one.",
        ),
        param("negative_prompt", Text, "What not to draw; has no effect while the guidance scale is 1."),
        param("negative_prompt_2", Text, "The negative text for the second encoder, if not `negative_prompt`."),
        *_embeddings_inputs(),
        param("clip_skip", int, "Last layers of the text encoders to leave out, at least 0. None: SDXL's way."),
        param("cross_attention_kwargs", dict[str, Any], "Arguments for attention processors, such as a LoRA scale."),
    ]


def _embeddings_inputs() -> list[InputParam]:
    kind, tensor = DENOISER_INPUT_FIELDS, torch.Tensor
    return [
        param("prompt_embeds", tensor, "In place of `prompt`: text embeddings (prompts, tokens, width).", kind=kind),
        param("pooled_prompt_embeds", tensor, "Goes with `prompt_embeds`: (prompts, width).", kind=kind),
        param("negative_prompt_embeds", tensor, "In place of `negative_prompt`, beside `prompt_embeds`.", kind=kind),
        param("negative_pooled_prompt_embeds", tensor, "Goes with `negative_prompt_embeds`.", kind=kind),
    ]


def _sampling_inputs() -> list[InputParam]:
    return [
        param(
            "num_inference_steps", int, "Denoising steps, 4 to 8 as a rule. None: as the weights recommend, else 6."
        ),
        param("timesteps", list[int], "In place of a number of steps: descending, with every window start."),
        num_images_per_prompt_input(),
        generator_input(),
        param(
            "latents",
            torch.Tensor,
            "Starting noise (pictures, channels, height/f, width/f), f the VAE's factor; for image-to-image in place "
            "of the noised picture.",
        ),
        output_type_input(),
        on_nonfinite_input(),
    ]


def _picture_inputs() -> list[InputParam]:
    return [
        param("image", Pictures, "The picture to start from: one for all prompts, or one for each."),
        param("mask_image", Pictures, "For inpainting, of the picture's size: white is painted, black kept."),
        param(
            "padding_mask_crop",
            int,
            "Paint only the mask's surroundings, this many pixels wide, at full size; PIL only.",
        ),
        param("image_latents", torch.Tensor, "In place of `image`: its latents (n, channels, height/f, width/f)."),
        param("mask", torch.Tensor, "In place of `mask_image`, beside `image_latents`: (n, 1, height/f, width/f)."),
        param("masked_image_latents", torch.Tensor, "Beside `mask`, for a 9-channel UNet: without the hole."),
        param(
            "strength",
            float,
            "Time in (0, 1] at which the picture enters: 1 redraws everything. The steps that are run are those below "
            "it and a first one from it, at least one. None: 0.3 for image-to-image, 1.0 for inpainting.",
        ),
        noising_input(),
        denoising_start_input(),
        denoising_end_input(),
    ]


def _control_inputs() -> list[InputParam]:
    share = "Share of the steps, in [0, 1],"
    number = float | list[float]
    return [
        param("control_image", Pictures, "For a ControlNet: the control picture, or a list for several of them."),
        param("control_mode", int | list[int], "For a ControlNet-Union: the kind of each control picture."),
        param("controlnet_conditioning_scale", number, "Weight of the ControlNet, or of each. None: 1."),
        param("control_guidance_start", number, f"{share} at which the ControlNet begins. None: 0."),
        param("control_guidance_end", number, f"{share} at which the ControlNet ends. None: 1."),
        param("guess_mode", bool, "Whether the ControlNet sees the conditional batches only. None: no."),
        param("ip_adapter_image", Pictures, "For IP-Adapters: a picture, or a list with one entry for each of them."),
        param(
            "ip_adapter_embeds",
            list[torch.Tensor],
            "In place of `ip_adapter_image`: one tensor for each IP-Adapter.",
            kind=DENOISER_INPUT_FIELDS,
        ),
        param(
            "negative_ip_adapter_embeds",
            list[torch.Tensor],
            "Goes with `ip_adapter_embeds`.",
            kind=DENOISER_INPUT_FIELDS,
        ),
    ]


def _size_inputs() -> list[InputParam]:
    told = "that SDXL is told, (height, width) in pixels"
    return [
        param(
            "height",
            int,
            "Height in pixels, a multiple of the VAE's factor. None: the given picture's, else the UNet's own.",
        ),
        param(
            "width",
            int,
            "Width in pixels, a multiple of the VAE's factor. None: the given picture's, else the UNet's own.",
        ),
        param("original_size", Size, f"Size before cropping {told}. None: the picture's."),
        param("aesthetic_score", float, "For SDXL's refiner: how pleasing the picture shall be.", default=6.0),
        param("negative_aesthetic_score", float, "`aesthetic_score` of the negative prompt.", default=2.0),
        param("target_size", Size, f"Size wanted {told}. None: the picture's."),
        param("crops_coords_top_left", Size, "Where the crop began that SDXL is told, (top, left).", default=(0, 0)),
        param(
            "negative_original_size",
            Size,
            "`original_size` for the negative prompt; goes with `negative_target_size`.",
        ),
        param(
            "negative_target_size", Size, "`target_size` for the negative prompt; goes with `negative_original_size`."
        ),
        param(
            "negative_crops_coords_top_left", Size, "`crops_coords_top_left` of the negative prompt.", default=(0, 0)
        ),
    ]
