"""The components and configuration values that more than one block declares, each defined once.

Functions return new specs, because diffusers writes into those that a block returns.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    ClassifierFreeGuidance,
    ControlNetModel,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec

from ..attention.config import AttentionConfig
from ..delta.recipe import DeltaRecipe
from ..schedulers.scheduling_perflow import BASE_TYPE, settings_of_others

SCHEDULER_SETTINGS = ("prediction_type", "num_time_windows", "window_boundaries", "solver_order", "theta")
"""The configuration values that are settings of the PeRFlowScheduler too."""

DEFAULT_GUIDANCE_SCALE = 2.0  # of the guider that a pipeline makes, before anything is known of its model
SDXL = DeltaRecipe("ddim_eps", num_inference_steps=6, guidance_scale=DEFAULT_GUIDANCE_SCALE)
SD_15 = DeltaRecipe("diff_eps", num_inference_steps=8, guidance_scale=4.5)
SD_21 = DeltaRecipe("velocity", num_inference_steps=8, guidance_scale=7.5)
"""Recommended for the published weights (https://github.com/magic-research/piecewise-rectified-flow)."""


def usual_recipe(pipe: Any) -> DeltaRecipe:
    """How weights of the pipeline's family are sampled where nothing else says so, by its UNet and scheduler."""
    unet, scheduler = (getattr(pipe, name, None) for name in ("unet", "scheduler"))
    config = {} if unet is None else unet.config
    if config.get("cross_attention_dim") is None or config.get("addition_embed_type") is not None:
        return SDXL
    schedule = {} if scheduler is None else scheduler.config
    is_velocity = schedule.get("prediction_type") == "velocity"
    return SD_21 if is_velocity or settings_of_others(schedule).get(BASE_TYPE) == "v_prediction" else SD_15


def unet_spec() -> ComponentSpec:
    return ComponentSpec("unet", UNet2DConditionModel, description="A PeRFlow student, or the base for a delta.")


def controlnet_spec() -> ComponentSpec:
    return ComponentSpec("controlnet", ControlNetModel, description="One ControlNet, several, or a ControlNet-Union.")


def vae_spec() -> ComponentSpec:
    return ComponentSpec("vae", AutoencoderKL, description="Encodes and decodes images.")


def scheduler_spec() -> ComponentSpec:
    """The stock type, because the window set-up converts whatever scheduler the repository names."""
    return ComponentSpec(
        "scheduler",
        EulerDiscreteScheduler,
        description="Any scheduler of the base model, or none; becomes a PeRFlowScheduler of its noise schedule.",
    )


def guider_spec() -> ComponentSpec:
    """The default guider. Of several declarations the first block's holds, so this package's blocks come first."""
    return ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        description="Combines the predictions with and without the prompt. A guider that you set is kept.",
        config=FrozenDict({"guidance_scale": DEFAULT_GUIDANCE_SCALE}),
        default_creation_method="from_config",
    )


def attention_spec() -> ComponentSpec:
    return ComponentSpec(
        "attention",
        AttentionConfig,
        description="Which attention strategies UNet and ControlNets use, and what they ran.",
        config=FrozenDict({"plan": None}),
        default_creation_method="from_config",
    )


def attention_config_specs() -> list[ConfigSpec]:
    """The attention plan of an index: a list, because JSON need not keep the order of a mapping's entries."""
    plan = (
        'Attention strategies: a name for all modules, or a list such as ["self=sage", "mid_block.*=native"]. '
        "None: the models stay as they are. Holds the plan of an AttentionConfig that you set."
    )
    return [ConfigSpec("attention_plan", None, plan)]


def schedule_config_specs() -> list[ConfigSpec]:
    """How the student was distilled, for the window set-up. None: the merged delta's recipe, else the default.

    What is usual depends on the model: ddim_eps, 6 steps and guidance 2.0 for SDXL, see `usual_recipe`.
    """
    descriptions = {
        "prediction_type": "What the UNet predicts: ddim_eps, diff_eps, velocity. None: the recipe's, else the usual.",
        "num_time_windows": "Number of equal time windows, at least 1. None: the recipe's, else 4.",
        "window_boundaries": "Descending times from 1 (noise) to 0 (data). None: the recipe's, else equal windows.",
        "solver_order": "1, or 2 for better images with more steps than windows. None: the recipe's, else 1.",
        "theta": "Corrections of each window's steps, (windows, 2), as of PeRFlowScheduler. None: the recipe's.",
        "default_num_inference_steps": "Steps of a call that gives no number. None: the recipe's, else the usual.",
    }
    return [ConfigSpec(name, None, description) for name, description in descriptions.items()]


def delta_config_specs() -> list[ConfigSpec]:
    """The delta of an index, and the guidance it was distilled for."""
    guidance = "Scale of the default guider, at least 0. None: the delta's recipe, else the usual."
    return [
        ConfigSpec("delta", None, "A file of delta weights that every call merges, relative to what was loaded."),
        ConfigSpec(
            "delta_variant", None, 'Which files of a `delta` folder to take, such as "fp16". None: no variant.'
        ),
        ConfigSpec("delta_scale", 1.0, "Factor of the delta in calls that give none: 1 as distilled, 0 without it."),
        ConfigSpec("guidance_scale", None, guidance),
    ]
