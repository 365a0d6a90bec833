"""The components and configuration values that more than one block declares, each defined once.

Functions return new specs, because diffusers writes into those that a block returns.
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
"""Recommended for the published SDXL weights (https://github.com/magic-research/piecewise-rectified-flow)."""


def unet_spec() -> ComponentSpec:
    return ComponentSpec("unet", UNet2DConditionModel, description="A PeRFlow student, or the base for a delta.")


def controlnet_spec() -> ComponentSpec:
    return ComponentSpec("controlnet", ControlNetModel, description="One ControlNet, several, or a ControlNet-Union.")


def vae_spec() -> ComponentSpec:
    return ComponentSpec(
        "vae", AutoencoderKL, description="Encodes and decodes images; gives the latents' size and channels."
    )


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
    return [
        ConfigSpec(
            "attention_plan",
            None,
            'Attention strategies: a name for all modules, or a list such as ["self=sage", "mid_block.*=native"]. '
            "None: the models stay as they are. Holds the plan of an AttentionConfig that you set.",
        )
    ]


def schedule_config_specs() -> list[ConfigSpec]:
    """How the student was distilled, for the window set-up."""
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
            "Steps of a call that gives no number, at least 1. None: the merged delta's recipe, else "
            f"{DEFAULT_NUM_INFERENCE_STEPS}.",
        ),
    ]


def delta_config_specs() -> list[ConfigSpec]:
    """The delta of an index, and the guidance it was distilled for."""
    return [
        ConfigSpec(
            "delta",
            None,
            "A file of delta weights that every call merges, relative to the directory or repository that was loaded.",
        ),
        ConfigSpec(
            "delta_variant",
            None,
            'Which files of a `delta` folder to take, such as "fp16". None: those without a variant.',
        ),
        ConfigSpec(
            "delta_scale",
            1.0,
            "Factor of the delta in calls that give none; 1 as it was distilled, 0 without it.",
        ),
        ConfigSpec(
            "guidance_scale",
            None,
            "Scale of the default guider, at least 0. None: the merged delta's recipe, else "
            f"{DEFAULT_GUIDANCE_SCALE}.",
        ),
    ]
