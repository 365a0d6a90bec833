"""Plausible inputs and components for a block, of the sizes that the tiny components have: one image, four steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor

from ..schedulers import PeRFlowScheduler
from . import tiny

TINY: dict[type, Callable[[], Any]] = {
    diffusers.AutoencoderKL: tiny.tiny_vae,
    diffusers.ControlNetModel: tiny.tiny_controlnet,
    diffusers.ControlNetUnionModel: tiny.tiny_controlnet_union,
    diffusers.UNet2DConditionModel: tiny.tiny_sdxl_unet,
    transformers.CLIPImageProcessor: tiny.tiny_feature_extractor,
    transformers.CLIPTextModel: lambda: tiny.tiny_sdxl_components()["text_encoder"],
    transformers.CLIPTextModelWithProjection: lambda: tiny.tiny_sdxl_components()["text_encoder_2"],
    transformers.CLIPTokenizer: tiny.tiny_tokenizer,
    transformers.CLIPVisionModelWithProjection: tiny.tiny_image_encoder,
}
NUM_STEPS = 4
NEGATIVE = frozenset({"negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_add_time_ids"})
CONDITIONING = NEGATIVE | {"prompt_embeds", "pooled_prompt_embeds", "add_time_ids"}
"""What an input gets that has no name and collects the `denoiser_input_fields`."""


def fill_components(pipe: Any, block: ModularPipelineBlocks, given: Mapping[str, Any]) -> None:
    """Gives the block's pipeline all its components; `given` wins, also over configuration values.

    Raises:
        ValueError: a component that is neither given, nor known, nor made from its configuration.
    """
    components = {}
    for name in pipe.components:
        kind = pipe.get_component_spec(name).type_hint
        if name in given:
            components[name] = given[name]
        elif kind in TINY:
            components[name] = TINY[kind]()
        elif isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            components[name] = kind(**tiny.BETAS)
        elif getattr(pipe, name) is None:
            raise ValueError(
                f"{type(block).__name__} needs the component {name!r}, for which there is no tiny one; "
                f'pass components={{"{name}": ...}}.'
            )
    pipe.register_components(**components)
    declared = {spec.name for spec in block.expected_configs}
    pipe.update_components(**{name: value for name, value in given.items() if name in declared})


def fill_inputs(
    params: Iterable[InputParam], given: Mapping[str, Any], block_name: str
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A value for each declared input, as a pipeline would hand them to the block, and their names by `kwargs_type`.

    Optional inputs keep their defaults, but for some without which little would run. An input without a name, which
    collects all of a `kwargs_type`, gets what is given beyond the declared names.

    Raises:
        ValueError: a required input that is neither given nor known.
    """
    params, known = list(params), {**tiny_inputs(), **given}
    names = {param.name for param in params}
    also = {"generator", "prompt"} | (set() if "prompt" in names else NEGATIVE)
    values: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {}
    for param in params:
        if not param.name:
            collected = CONDITIONING if param.kwargs_type == "denoiser_input_fields" else frozenset()
            kinds.setdefault(param.kwargs_type, []).extend(collected | (given.keys() - names - LOOP_NAMES))
            values |= {name: known[name] for name in kinds[param.kwargs_type]}
            continue
        required = param.default is None and (param.required or param.name in also)
        if required and param.name not in known:
            raise ValueError(
                f"{block_name} requires the input {param.name!r}, for which there is no tiny value; "
                f'pass inputs={{"{param.name}": ...}}.'
            )
        values[param.name] = known[param.name] if required or param.name in given else param.default
        if param.kwargs_type:
            kinds.setdefault(param.kwargs_type, []).append(param.name)
    return values, kinds


LOOP_NAMES = frozenset({"window_index", "stop_requested"})
"""What the loop itself puts on the block state: blocks inside read it without declaring it."""


def tiny_inputs() -> dict[str, Any]:
    """A value for each known name, newly made: four steps over four windows, each of which starts a window."""
    scheduler = PeRFlowScheduler(**tiny.BETAS)
    scheduler.set_timesteps(NUM_STEPS)
    plan = scheduler.plan
    latents, pixels = (1, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE), (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    mask = torch.zeros(1, 1, *latents[2:])
    mask[..., tiny.LATENT_SIZE // 4 :, tiny.LATENT_SIZE // 2 :] = 1.0  # as in tiny_mask
    time_ids = torch.tensor([[tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 0, 0, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE]])
    return {
        "prompt": "a red star",
        "prompt_embeds": _noise(1, tiny.MAX_TOKENS, 2 * tiny.TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": _noise(1, tiny.MAX_TOKENS, 2 * tiny.TEXT_WIDTH, seed=2),
        "pooled_prompt_embeds": _noise(1, tiny.TEXT_WIDTH, seed=3),
        "negative_pooled_prompt_embeds": _noise(1, tiny.TEXT_WIDTH, seed=4),
        "add_time_ids": time_ids.float(),
        "negative_add_time_ids": time_ids.float(),
        "batch_size": 1,
        "num_images_per_prompt": 1,
        "dtype": torch.float32,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pil",
        "timesteps": scheduler.timesteps,
        "num_inference_steps": NUM_STEPS,
        "step_plan": plan,
        "step_coefficients": plan.coefficients(),
        "noise_coefficients": torch.tensor([*((a**0.5, (1.0 - a) ** 0.5) for a in plan.alpha_start), (1.0, 0.0)]),
        "strength": 1.0,
        "latents": _noise(*latents, seed=5),
        "noise_pred": _noise(*latents, seed=6),
        "noise": _noise(*latents, seed=7),
        "image_latents": _noise(*latents, seed=8),
        "masked_image_latents": _noise(*latents, seed=9),
        "mask": mask,
        "inpaint_conditioning": torch.cat([mask, _noise(*latents, seed=9)], dim=1),
        "height": tiny.IMAGE_SIZE,
        "width": tiny.IMAGE_SIZE,
        "image": tiny.tiny_picture(0),
        "mask_image": tiny.tiny_mask(),
        "processed_image": _noise(*pixels, seed=10).tanh(),
        "images": [tiny.tiny_picture(1)],
        "ip_adapter_image": tiny.tiny_picture(2),
        "ip_adapter_embeds": [_noise(1, 1, tiny.IMAGE_WIDTH, seed=11)],
        "negative_ip_adapter_embeds": [torch.zeros(1, 1, tiny.IMAGE_WIDTH)],
        "control_image": tiny.tiny_picture(3),
        "control_mode": [0],
        "controlnet_cond": _noise(*pixels, seed=12).sigmoid(),
        "conditioning_scale": 1.0,
        "controlnet_keep": [1.0] * NUM_STEPS,
        "guess_mode": False,
        "control_type": torch.eye(tiny.CONTROL_TYPES)[:1],
        "control_type_idx": [0],
    }


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
