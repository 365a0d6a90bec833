"""Every component, configuration value and loop tensor that more than one block names, each defined once.

Functions, not constants: diffusers writes into the specs that a block returns, so each call must make new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ClassifierFreeGuidance, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam

from ..core.plan import StepPlan
from .delta_recipe import DeltaRecipe

DEFAULT_NUM_INFERENCE_STEPS = 6
DEFAULT_GUIDANCE_SCALE = 2.0
"""What the published SDXL weights recommend (https://github.com/magic-research/piecewise-rectified-flow)."""

DENOISER_INPUT_FIELDS = "denoiser_input_fields"
"""The name under which diffusers collects the tensors that the guider splits."""


def unet_spec() -> ComponentSpec:
    return ComponentSpec("unet", UNet2DConditionModel, description="The PeRFlow student, or a base for its delta.")


def vae_spec() -> ComponentSpec:
    return ComponentSpec("vae", AutoencoderKL, description="Gives the size and the channels of the latents.")


def scheduler_spec() -> ComponentSpec:
    """The stock type: a repository's entry overrides it anyway, and the window set-up converts what it finds."""
    return ComponentSpec(
        "scheduler",
        EulerDiscreteScheduler,
        description="Any scheduler of the base model, or none; becomes a PeRFlowScheduler with its noise schedule.",
    )


def guider_spec() -> ComponentSpec:
    """The guider of the first block that names one is the pipeline's, so blocks of this project come first."""
    return ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        description="Combines the predictions with and without the prompt. A guider of your own always wins.",
        config=FrozenDict({"guidance_scale": DEFAULT_GUIDANCE_SCALE}),
        default_creation_method="from_config",
    )


def schedule_config_specs() -> list[ConfigSpec]:
    """How the student was distilled: what the window set-up needs to know."""
    return [
        ConfigSpec(
            "prediction_type",
            None,
            "What the UNet predicts: ddim_eps, diff_eps or velocity. None: the merged delta's recipe, else ddim_eps.",
        ),
        ConfigSpec(
            "num_time_windows",
            None,
            "Number of equal time windows, at least 1. None: the merged delta's recipe, else 4.",
        ),
        ConfigSpec(
            "window_boundaries",
            None,
            "Descending times from 1 (noise) to 0 (data), for unequal windows. None: the recipe's, else equal ones.",
        ),
        ConfigSpec(
            "default_num_inference_steps",
            None,
            "Steps of a call that names none, at least 1. None: the merged delta's recipe, else "
            f"{DEFAULT_NUM_INFERENCE_STEPS}.",
        ),
    ]


def delta_config_specs() -> list[ConfigSpec]:
    """What an index says about the accelerator and the guidance it was distilled for."""
    return [
        ConfigSpec(
            "delta",
            None,
            "A delta-weights file that every call merges, relative to the directory or repository that was loaded.",
        ),
        ConfigSpec(
            "guidance_scale",
            None,
            "Scale of the default guider, at least 0. None: the merged delta's recipe, else "
            f"{DEFAULT_GUIDANCE_SCALE}.",
        ),
    ]


def _param(
    name: str, type_hint: Any, description: str, *, required: bool = False, kind: str | None = None
) -> InputParam:
    return InputParam(name, type_hint=type_hint, description=description, required=required, kwargs_type=kind)


def latents_input() -> InputParam:
    return _param("latents", torch.Tensor, "Latents (batch, channels, height/f, width/f) of this step.", required=True)


def delta_recipe_input() -> InputParam:
    return _param(
        "delta_recipe", DeltaRecipe, "How the merged delta was distilled, from `merge_delta`; None without a delta."
    )


def schedule_inputs() -> list[InputParam]:
    """What the window set-up hands to the loop."""
    return [
        _param("timesteps", torch.Tensor, "Timesteps (num_steps,), integers on the device.", required=True),
        _param("num_inference_steps", int, "Number of denoising steps.", required=True),
        _param("step_plan", StepPlan, "The steps on the host: times, windows, coefficients.", required=True),
        _param(
            "step_coefficients", torch.Tensor, "The plan's table (num_steps, 4) on the device, float32.", required=True
        ),
    ]


def conditioning_inputs() -> list[InputParam]:
    """What the UNet is conditioned on; each `negative_` twin goes to the guider's unconditional batch."""
    kind = DENOISER_INPUT_FIELDS
    tensor, tensors = torch.Tensor, list[torch.Tensor]
    return [
        _param("prompt_embeds", tensor, "Text embeddings (batch, tokens, width).", required=True, kind=kind),
        _param("negative_prompt_embeds", tensor, "Text embeddings of the negative prompt.", kind=kind),
        _param("pooled_prompt_embeds", tensor, "Pooled text embeddings (batch, width).", required=True, kind=kind),
        _param("negative_pooled_prompt_embeds", tensor, "Pooled embeddings of the negative prompt.", kind=kind),
        _param("add_time_ids", tensor, "Sizes and crop (batch, 6) that SDXL is told.", required=True, kind=kind),
        _param("negative_add_time_ids", tensor, "Sizes and crop of the negative prompt.", kind=kind),
        _param("ip_adapter_embeds", tensors, "Image embeddings, one tensor per loaded IP-Adapter.", kind=kind),
        _param("negative_ip_adapter_embeds", tensors, "Embeddings of the empty image, likewise.", kind=kind),
    ]
