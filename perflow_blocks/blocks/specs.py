"""Every component and configuration value that more than one block names, each defined once.

Functions, not constants: diffusers writes into the specs that a block returns, so each call must make new ones.
"""

from __future__ import annotations

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

DEFAULT_NUM_INFERENCE_STEPS = 6
DEFAULT_GUIDANCE_SCALE = 2.0
"""What the published SDXL weights recommend (https://github.com/magic-research/piecewise-rectified-flow)."""


def unet_spec() -> ComponentSpec:
    return ComponentSpec("unet", UNet2DConditionModel, description="The PeRFlow student, or a base for its delta.")


def controlnet_spec() -> ComponentSpec:
    return ComponentSpec(
        "controlnet", ControlNetModel, description="ControlNet, several of them, or a ControlNet-Union."
    )


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


def attention_spec() -> ComponentSpec:
    return ComponentSpec(
        "attention",
        AttentionConfig,
        description="Which attention strategies UNet and ControlNets use, and what they ran.",
        config=FrozenDict({"plan": None}),
        default_creation_method="from_config",
    )


def attention_config_specs() -> list[ConfigSpec]:
    """What an index says about attention: a list, since JSON need not keep the order of a mapping's entries."""
    return [
        ConfigSpec(
            "attention_plan",
            None,
            'Attention strategies: a name for all modules, or a list such as ["self=sage", "mid_block.*=native"]. '
            "None: the models stay as they are. The plan of an AttentionConfig that you set is written here.",
        )
    ]


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
            "delta_variant",
            None,
            'Which files to take where `delta` is a folder with several: "fp16", say. None: those without a variant.',
        ),
        ConfigSpec(
            "delta_scale",
            1.0,
            "Factor of the delta in calls that name none; 1 as it was distilled, 0 for none.",
        ),
        ConfigSpec(
            "guidance_scale",
            None,
            "Scale of the default guider, at least 0. None: the merged delta's recipe, else "
            f"{DEFAULT_GUIDANCE_SCALE}.",
        ),
    ]
