"""The assembled presets. Each is a list of blocks; what diffusers already has is diffusers' own block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import (
    StableDiffusionXLInputStep,
    StableDiffusionXLPrepareAdditionalConditioningStep,
    StableDiffusionXLPrepareLatentsStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep
from PIL import Image

from ..components.specs import DEFAULT_GUIDANCE_SCALE
from .check_inputs import PeRFlowCheckInputsStep
from .denoise import PeRFlowDenoiseStep
from .finite_guard import FiniteGuardStep
from .merge_delta import PeRFlowMergeDeltaStep
from .set_timesteps import PeRFlowSetTimestepsStep


class PeRFlowSDXLBeforeDenoiseStep(SequentialPipelineBlocks):
    """Windows, starting noise and SDXL's size conditioning of a text-to-image run."""

    block_classes = [  # noqa: RUF012  (as diffusers declares them)
        PeRFlowSetTimestepsStep,
        StableDiffusionXLPrepareLatentsStep,
        StableDiffusionXLPrepareAdditionalConditioningStep,
    ]
    block_names = ["set_timesteps", "prepare_latents", "prepare_add_cond"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Prepares the loop: the window set-up, the starting noise and SDXL's size conditioning."


class PeRFlowSDXLCoreDenoiseStep(SequentialPipelineBlocks):
    """From text embeddings to denoised latents."""

    block_classes = [  # noqa: RUF012
        StableDiffusionXLInputStep,
        PeRFlowSDXLBeforeDenoiseStep,
        PeRFlowDenoiseStep,
        FiniteGuardStep,
    ]
    block_names = ["input", "before_denoise", "denoise", "finite_guard"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Denoises: batches the embeddings, sets up windows and noise, runs the few steps, checks the result."

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Hands on what `pipe.set_progress_bar_config` says, which by itself reaches top-level blocks only."""
        for block in self.sub_blocks.values():
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**kwargs)


class PeRFlowSDXLAutoBlocks(SequentialPipelineBlocks):
    """PeRFlow for Stable Diffusion XL: pictures in 4 to 8 steps (arXiv 2405.07510).

    Top-level names are diffusers' own (`text_encoder`, `denoise`, `decode`), after `check_inputs` and `merge_delta`.

    Example:
        >>> pipe = PeRFlowSDXLAutoBlocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(dtype=torch.float16)
        >>> images = pipe(prompt="a red star", delta="perflow_delta.safetensors", output="images")
    """

    block_classes = [  # noqa: RUF012
        PeRFlowCheckInputsStep,
        PeRFlowMergeDeltaStep,
        StableDiffusionXLTextEncoderStep,
        PeRFlowSDXLCoreDenoiseStep,
        StableDiffusionXLDecodeStep,
    ]
    block_names = ["check_inputs", "merge_delta", "text_encoder", "denoise", "decode"]  # noqa: RUF012
    _workflow_map = {"text2image": {"prompt": True}}  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "PeRFlow few-step generation with Stable Diffusion XL: pictures in 4 to 8 steps.\n"
            "The UNet is one that PeRFlow distilled, or any SDXL fine-tune with a delta file merged in.\n"
            "Guidance is the component `guider` (default scale "
            f"{DEFAULT_GUIDANCE_SCALE:g}): pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.5))."
        )

    @property
    def outputs(self) -> list[OutputParam]:
        return [
            OutputParam(
                "images",
                type_hint=list[Image.Image] | np.ndarray | torch.Tensor,
                description="The pictures, as `output_type` says; for `latent` the latents as they are.",
            )
        ]
