"""The assembled presets. Each is a list of blocks; what diffusers already has right is diffusers' own block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ModularPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from PIL import Image

from .apply_attention import PeRFlowAutoApplyAttentionStep
from .assembly import AskedOnce
from .before_denoise import PeRFlowSDXLAutoBeforeDenoiseStep
from .check_inputs import PeRFlowCheckInputsStep
from .controlnet_input import PeRFlowAutoControlNetInputStep
from .decode import PeRFlowAutoDecodeStep
from .denoise import (
    PeRFlowControlNetDenoiseStep,
    PeRFlowDenoiseStep,
    PeRFlowInpaintControlNetDenoiseStep,
    PeRFlowInpaintDenoiseStep,
)
from .encode import PeRFlowAutoIPAdapterStep, PeRFlowAutoTextEncoderStep, PeRFlowAutoVaeEncoderStep
from .input import PeRFlowInputStep
from .memory_format import PeRFlowAutoMemoryFormatStep
from .merge_delta import PeRFlowMergeDeltaStep
from .specs import DEFAULT_GUIDANCE_SCALE


class PeRFlowSDXLAutoControlNetDenoiseStep(AskedOnce, AutoPipelineBlocks):
    """The loop with a ControlNet, for inpainting where there is a mask."""

    block_classes = [PeRFlowInpaintControlNetDenoiseStep, PeRFlowControlNetDenoiseStep]  # noqa: RUF012
    block_names = ["inpaint_controlnet_denoise", "controlnet_denoise"]  # noqa: RUF012
    block_trigger_inputs = ["mask", "controlnet_cond"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "The denoising loop with a ControlNet, for inpainting where there is a mask."


class PeRFlowSDXLAutoDenoiseStep(AskedOnce, AutoPipelineBlocks):
    """The loop that the task calls for."""

    block_classes = [  # noqa: RUF012
        PeRFlowSDXLAutoControlNetDenoiseStep,
        PeRFlowInpaintDenoiseStep,
        PeRFlowDenoiseStep,
    ]
    block_names = ["controlnet_denoise", "inpaint_denoise", "denoise"]  # noqa: RUF012
    block_trigger_inputs = ["controlnet_cond", "mask", None]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "The denoising loop: with a ControlNet for `controlnet_cond`, for inpainting with `mask`, else plain."


class PeRFlowSDXLCoreDenoiseStep(SequentialPipelineBlocks):
    """From embeddings and encoded pictures to denoised latents, for every task."""

    block_classes = [  # noqa: RUF012
        PeRFlowInputStep,
        PeRFlowSDXLAutoBeforeDenoiseStep,
        PeRFlowAutoControlNetInputStep,
        PeRFlowSDXLAutoDenoiseStep,
    ]
    block_names = ["input", "before_denoise", "controlnet_input", "denoise"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Denoises: batches the embeddings, sets up windows and latents, prepares control, runs the few steps."

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Hands on what `pipe.set_progress_bar_config` says, which by itself reaches top-level blocks only."""
        _configure_progress_bars(self, kwargs)


class PeRFlowSDXLAutoBlocks(SequentialPipelineBlocks):
    """PeRFlow for Stable Diffusion XL: pictures in 4 to 8 steps (arXiv 2405.07510).

    Text-to-image, image-to-image and inpainting, each with ControlNets, ControlNet-Union and IP-Adapters: the
    workflows of `StableDiffusionXLAutoBlocks`, chosen by what a call is given. Top-level names are diffusers' own
    (`text_encoder`, `ip_adapter`, `vae_encoder`, `denoise`, `decode`), after `check_inputs`,
    `apply_attention`, `merge_delta` and `memory_format`.

    Example:
        >>> pipe = PeRFlowSDXLAutoBlocks().init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(dtype=torch.float16)
        >>> images = pipe(prompt="a red star", delta="perflow_delta.safetensors", output="images")
        >>> images = pipe(prompt="a red star", image=images[0], strength=0.5, output="images")
    """

    block_classes = [  # noqa: RUF012
        PeRFlowCheckInputsStep,
        PeRFlowAutoApplyAttentionStep,
        PeRFlowMergeDeltaStep,
        PeRFlowAutoMemoryFormatStep,
        PeRFlowAutoTextEncoderStep,
        PeRFlowAutoIPAdapterStep,
        PeRFlowAutoVaeEncoderStep,
        PeRFlowSDXLCoreDenoiseStep,
        PeRFlowAutoDecodeStep,
    ]
    block_names = [  # noqa: RUF012
        "check_inputs",
        "apply_attention",
        "merge_delta",
        "memory_format",
        "text_encoder",
        "ip_adapter",
        "vae_encoder",
        "denoise",
        "decode",
    ]
    _workflow_map = StableDiffusionXLAutoBlocks._workflow_map

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


def _configure_progress_bars(block: ModularPipelineBlocks, config: dict[str, Any]) -> None:
    for inner in block.sub_blocks.values():
        if hasattr(inner, "set_progress_bar_config"):
            inner.set_progress_bar_config(**config)
        else:
            _configure_progress_bars(inner, config)
