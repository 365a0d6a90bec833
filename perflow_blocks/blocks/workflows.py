"""Presets for one task each: what `PeRFlowSDXLAutoBlocks` chooses by the inputs of a call, as blocks of their own.

They take the inputs and need the components of their task alone, which is what a published workflow should show.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.before_denoise import StableDiffusionXLControlNetInputStep
from PIL import Image

from .apply_attention import PeRFlowApplyAttentionStep, PeRFlowControlNetApplyAttentionStep
from .auto_blocks import PeRFlowSDXLCoreDenoiseStep
from .before_denoise import (
    PeRFlowSDXLBeforeDenoiseStep,
    PeRFlowSDXLImg2ImgBeforeDenoiseStep,
    PeRFlowSDXLInpaintBeforeDenoiseStep,
)
from .check_inputs import PeRFlowCheckInputsStep
from .decode import PeRFlowAutoDecodeStep, PeRFlowDecodeStep
from .denoise import PeRFlowControlNetDenoiseStep, PeRFlowDenoiseStep, PeRFlowInpaintDenoiseStep
from .encode import (
    PeRFlowInpaintVaeEncoderStep,
    PeRFlowIPAdapterStep,
    PeRFlowTextEncoderStep,
    PeRFlowVaeEncoderStep,
)
from .finite_guard import ControlNetFiniteGuardStep
from .input import PeRFlowInputStep
from .memory_format import PeRFlowControlNetMemoryFormatStep, PeRFlowMemoryFormatStep
from .merge_delta import PeRFlowMergeDeltaStep
from .solver import PeRFlowLoopSolverStep
from .tiled_denoise import PeRFlowTiledControlNetLoopDenoiser

_PREPARE = [PeRFlowCheckInputsStep, PeRFlowApplyAttentionStep, PeRFlowMergeDeltaStep, PeRFlowMemoryFormatStep]
_PREPARE_CONTROL = [
    PeRFlowCheckInputsStep,
    PeRFlowControlNetApplyAttentionStep,
    PeRFlowMergeDeltaStep,
    PeRFlowControlNetMemoryFormatStep,
]
_PREPARE_NAMES = ["check_inputs", "apply_attention", "merge_delta", "memory_format"]
_STAGES = ["input", "before_denoise", "denoise"]
_CONTROL_STAGES = ["input", "before_denoise", "controlnet_input", "denoise"]


class PeRFlowSDXLText2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLBeforeDenoiseStep, PeRFlowDenoiseStep]  # noqa: RUF012
    block_names = _STAGES


class PeRFlowSDXLImage2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings and an encoded picture to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLImg2ImgBeforeDenoiseStep, PeRFlowDenoiseStep]  # noqa: RUF012
    block_names = _STAGES


class PeRFlowSDXLInpaintDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings, an encoded picture and its mask to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLInpaintBeforeDenoiseStep, PeRFlowInpaintDenoiseStep]  # noqa: RUF012
    block_names = _STAGES


class PeRFlowSDXLControlNetText2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings and a control picture to denoised latents."""

    block_classes = [  # noqa: RUF012
        PeRFlowInputStep,
        PeRFlowSDXLBeforeDenoiseStep,
        StableDiffusionXLControlNetInputStep,
        PeRFlowControlNetDenoiseStep,
    ]
    block_names = _CONTROL_STAGES


class PeRFlowTiledControlNetDenoiseStep(PeRFlowControlNetDenoiseStep):
    """The loop with a ControlNet that predicts large pictures tile by tile."""

    block_classes = [  # noqa: RUF012
        ControlNetFiniteGuardStep,
        PeRFlowTiledControlNetLoopDenoiser,
        PeRFlowLoopSolverStep,
    ]


class PeRFlowSDXLTileUpscalerDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings, an encoded picture and a control picture to denoised latents, tile by tile."""

    block_classes = [  # noqa: RUF012
        PeRFlowInputStep,
        PeRFlowSDXLImg2ImgBeforeDenoiseStep,
        StableDiffusionXLControlNetInputStep,
        PeRFlowTiledControlNetDenoiseStep,
    ]
    block_names = _CONTROL_STAGES


class _Task(SequentialPipelineBlocks):
    """One task: its blocks are two lists, its one output are the pictures.

    The check of a request reads the inputs of every task; those that nothing else reads are not this one's.
    """

    @property
    def inputs(self) -> list[InputParam]:
        parts = [block for block in self.sub_blocks.values() if not isinstance(block, PeRFlowCheckInputsStep)]
        used = {param.name for part in parts for param in part.inputs}
        return [param for param in super().inputs if param.name in used]

    @property
    def outputs(self) -> list[OutputParam]:
        return [
            OutputParam(
                "images",
                type_hint=list[Image.Image] | np.ndarray | torch.Tensor,
                description="The pictures, as `output_type` says; for `latent` the latents as they are.",
            )
        ]


class PeRFlowSDXLText2ImageBlocks(_Task):
    """Text-to-image with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE,
        PeRFlowTextEncoderStep,
        PeRFlowSDXLText2ImageDenoiseStep,
        PeRFlowDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Draws pictures from prompts with Stable Diffusion XL, in 4 to 8 PeRFlow steps."


class PeRFlowSDXLImage2ImageBlocks(_Task):
    """Image-to-image with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE,
        PeRFlowTextEncoderStep,
        PeRFlowVaeEncoderStep,
        PeRFlowSDXLImage2ImageDenoiseStep,
        PeRFlowDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "vae_encoder", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Draws a picture again with Stable Diffusion XL, as much of it as `strength` says, in few PeRFlow steps.\n"
            "It is noised on the path that the student was trained on."
        )


class PeRFlowSDXLInpaintBlocks(_Task):
    """Inpainting with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE,
        PeRFlowTextEncoderStep,
        PeRFlowInpaintVaeEncoderStep,
        PeRFlowSDXLInpaintDenoiseStep,
        PeRFlowAutoDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "vae_encoder", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Paints the masked part of a picture anew with Stable Diffusion XL, in 4 to 8 PeRFlow steps. Every pixel "
            "outside the mask stays as it was."
        )


class PeRFlowSDXLControlNetBlocks(_Task):
    """Text-to-image along a control picture with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE_CONTROL,
        PeRFlowTextEncoderStep,
        PeRFlowSDXLControlNetText2ImageDenoiseStep,
        PeRFlowDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Draws pictures from prompts along a control picture, with a ControlNet, in 4 to 8 PeRFlow steps."


class PeRFlowSDXLTileUpscalerBlocks(_Task):
    """Upscaling of pictures of any size with Stable Diffusion XL and a ControlNet for tiles, in a few steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE_CONTROL,
        PeRFlowTextEncoderStep,
        PeRFlowVaeEncoderStep,
        PeRFlowSDXLTileUpscalerDenoiseStep,
        PeRFlowDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "vae_encoder", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return (
            "Gives an enlarged picture new detail, tile by tile and without seams, in a few PeRFlow steps.\n"
            "A ControlNet for tiles holds each tile to what it shows."
        )


class PeRFlowSDXLIPAdapterBlocks(_Task):
    """Text-to-image with a picture as part of the prompt, with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [  # noqa: RUF012
        *_PREPARE,
        PeRFlowTextEncoderStep,
        PeRFlowIPAdapterStep,
        PeRFlowSDXLText2ImageDenoiseStep,
        PeRFlowDecodeStep,
    ]
    block_names = [*_PREPARE_NAMES, "text_encoder", "ip_adapter", "denoise", "decode"]  # noqa: RUF012

    @property
    def description(self) -> str:
        return "Draws pictures from a prompt and a picture, by an IP-Adapter, in 4 to 8 PeRFlow steps."
