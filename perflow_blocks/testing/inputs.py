"""Plausible values for what blocks take, of the sizes that the tiny components have: one picture, four steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor

from ..schedulers import PeRFlowScheduler
from .tiny import (
    BETAS,
    CONTROL_TYPES,
    IMAGE_SIZE,
    IMAGE_WIDTH,
    LATENT_SIZE,
    MAX_TOKENS,
    TEXT_WIDTH,
    tiny_mask,
    tiny_picture,
)

NUM_STEPS = 4

ALSO_IF_OPTIONAL = frozenset(
    {
        "prompt",
        "generator",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "negative_add_time_ids",
    }
)
"""Inputs that are given where they are optional, since without them little would run; others keep their defaults."""

MADE_FROM_PROMPT = frozenset({"negative_prompt_embeds", "negative_pooled_prompt_embeds"})
"""What a block that takes a prompt is not given beside it."""

KINDS = {
    "denoiser_input_fields": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "add_time_ids",
        "negative_add_time_ids",
    )
}
"""What is given to an input that has no name but collects all of a `kwargs_type`."""


def tiny_inputs() -> dict[str, Any]:
    """A value for each known name, newly made. To make another name known, add it here."""
    return {**_texts(), **_schedule(), **_latents(), **_pictures(), **_control()}


def fill_inputs(
    params: Iterable[InputParam], given: Mapping[str, Any], block_name: str
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A value for each declared input, as a pipeline would hand them to the block, and their names by `kwargs_type`.

    An input without a name, which collects all of a `kwargs_type`, gets what is given beyond the declared names.

    Raises:
        ValueError: a required input that is neither given nor known.
    """
    params, known = list(params), tiny_inputs()
    further = [name for name in given if name not in {param.name for param in params}]
    also = ALSO_IF_OPTIONAL - (MADE_FROM_PROMPT if "prompt" in {param.name for param in params} else frozenset())
    values: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {}
    for param in params:
        if param.name:
            values[param.name] = _value(param, given, known, also, block_name)
            names = [param.name]
        else:
            names = [*KINDS.get(param.kwargs_type, ()), *further]
            values |= {name: given.get(name, known.get(name)) for name in names}
        if param.kwargs_type:
            kinds.setdefault(param.kwargs_type, []).extend(names)
    return values, kinds


def _value(
    param: InputParam, given: Mapping[str, Any], known: Mapping[str, Any], also: frozenset[str], block_name: str
) -> Any:
    if param.name in given:
        return given[param.name]
    if param.default is not None or not (param.required or param.name in also):
        return param.default
    if param.name not in known:
        raise ValueError(
            f"{block_name} requires the input {param.name!r}, for which there is no tiny value; "
            f'pass inputs={{"{param.name}": ...}}.'
        )
    return known[param.name]


def _texts() -> dict[str, Any]:
    size = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], dtype=torch.float32)
    return {
        "prompt": "a red star",
        "prompt_embeds": _noise(1, MAX_TOKENS, 2 * TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": _noise(1, MAX_TOKENS, 2 * TEXT_WIDTH, seed=2),
        "pooled_prompt_embeds": _noise(1, TEXT_WIDTH, seed=3),
        "negative_pooled_prompt_embeds": _noise(1, TEXT_WIDTH, seed=4),
        "add_time_ids": size,
        "negative_add_time_ids": size.clone(),
        "batch_size": 1,
        "num_images_per_prompt": 1,
        "dtype": torch.float32,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pil",
    }


def _schedule() -> dict[str, Any]:
    """Four steps over four windows, so that each step starts where a window does."""
    scheduler = PeRFlowScheduler(**BETAS)
    scheduler.set_timesteps(NUM_STEPS)
    plan = scheduler.plan
    noised = [(alpha**0.5, (1.0 - alpha) ** 0.5) for alpha in plan.alpha_start]
    return {
        "timesteps": scheduler.timesteps,
        "num_inference_steps": NUM_STEPS,
        "step_plan": plan,
        "step_coefficients": plan.coefficients(),
        "noise_coefficients": torch.tensor([*noised, (1.0, 0.0)]),
        "strength": 1.0,
    }


def _latents() -> dict[str, Any]:
    size = (LATENT_SIZE, LATENT_SIZE)
    mask = torch.zeros(1, 1, *size)
    mask[..., LATENT_SIZE // 4 :, LATENT_SIZE // 2 :] = 1.0  # as in tiny_mask
    return {
        "latents": _noise(1, 4, *size, seed=5),
        "noise_pred": _noise(1, 4, *size, seed=6),
        "noise": _noise(1, 4, *size, seed=7),
        "image_latents": _noise(1, 4, *size, seed=8),
        "masked_image_latents": _noise(1, 4, *size, seed=9),
        "mask": mask,
        "inpaint_conditioning": torch.cat([mask, _noise(1, 4, *size, seed=9)], dim=1),
    }


def _pictures() -> dict[str, Any]:
    return {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "image": tiny_picture(0),
        "mask_image": tiny_mask(),
        "processed_image": 2.0 * torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=_generator(10)) - 1.0,
        "images": [tiny_picture(1)],
        "ip_adapter_image": tiny_picture(2),
        "ip_adapter_embeds": [_noise(1, 1, IMAGE_WIDTH, seed=11)],
        "negative_ip_adapter_embeds": [torch.zeros(1, 1, IMAGE_WIDTH)],
    }


def _control() -> dict[str, Any]:
    return {
        "control_image": tiny_picture(3),
        "control_mode": [0],
        "controlnet_cond": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=_generator(12)),
        "conditioning_scale": 1.0,
        "controlnet_keep": [1.0] * NUM_STEPS,
        "guess_mode": False,
        "control_type": torch.nn.functional.one_hot(torch.tensor([0]), CONTROL_TYPES).float(),
        "control_type_idx": [0],
    }


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))
