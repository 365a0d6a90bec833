"""Presets for one task each: what `PeRFlowSDXLAutoBlocks` chooses by the inputs of a call, as blocks of their own.

They take the inputs and need the components of their task alone, which is what a published workflow should show.
"""

from __future__ import annotations

from .apply_attention import PeRFlowApplyAttentionStep
from .auto_blocks import PeRFlowSDXLCoreDenoiseStep, Preset
from .before_denoise import (
    PeRFlowInputStep,
    PeRFlowSDXLBeforeDenoiseStep,
    PeRFlowSDXLImg2ImgBeforeDenoiseStep,
    PeRFlowSDXLInpaintBeforeDenoiseStep,
)
from .check_inputs import PeRFlowCheckInputsStep
from .controlnet import (
    PeRFlowControlNetDenoiseStep,
    PeRFlowControlNetInputStep,
    PeRFlowTiledControlNetLoopDenoiser,
)
from .denoise import PeRFlowDenoiseStep, PeRFlowInpaintDenoiseStep, PeRFlowLoopSolverStep
from .encode import PeRFlowIPAdapterStep, PeRFlowTextEncoderStep
from .finite_guard import FiniteGuardStep
from .merge_delta import PeRFlowMergeDeltaStep
from .vae import PeRFlowAutoDecodeStep, PeRFlowDecodeStep, PeRFlowInpaintVaeEncoderStep, PeRFlowVaeEncoderStep

_PREPARE = [PeRFlowCheckInputsStep, PeRFlowApplyAttentionStep, PeRFlowMergeDeltaStep, PeRFlowTextEncoderStep]
_PREPARE_NAMES = ["check_inputs", "apply_attention", "merge_delta", "text_encoder"]
_STAGES = ["input", "before_denoise", "denoise"]
_CONTROL_STAGES = ["input", "before_denoise", "controlnet_input", "denoise"]


class PeRFlowSDXLText2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLBeforeDenoiseStep, PeRFlowDenoiseStep]
    block_names = _STAGES


class PeRFlowSDXLImage2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings and an encoded image to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLImg2ImgBeforeDenoiseStep, PeRFlowDenoiseStep]
    block_names = _STAGES


class PeRFlowSDXLInpaintDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings, an encoded image and its mask to denoised latents."""

    block_classes = [PeRFlowInputStep, PeRFlowSDXLInpaintBeforeDenoiseStep, PeRFlowInpaintDenoiseStep]
    block_names = _STAGES


class PeRFlowSDXLControlNetText2ImageDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings and a control image to denoised latents."""

    block_classes = [
        PeRFlowInputStep,
        PeRFlowSDXLBeforeDenoiseStep,
        PeRFlowControlNetInputStep,
        PeRFlowControlNetDenoiseStep,
    ]
    block_names = _CONTROL_STAGES


class PeRFlowTiledControlNetDenoiseStep(PeRFlowControlNetDenoiseStep):
    """The loop with a ControlNet that predicts large images tile by tile."""

    block_classes = [FiniteGuardStep, PeRFlowTiledControlNetLoopDenoiser, PeRFlowLoopSolverStep]


class PeRFlowSDXLTileUpscalerDenoiseStep(PeRFlowSDXLCoreDenoiseStep):
    """From embeddings, an encoded image and a control image to denoised latents, tile by tile."""

    block_classes = [
        PeRFlowInputStep,
        PeRFlowSDXLImg2ImgBeforeDenoiseStep,
        PeRFlowControlNetInputStep,
        PeRFlowTiledControlNetDenoiseStep,
    ]
    block_names = _CONTROL_STAGES


class PeRFlowSDXLText2ImageBlocks(Preset):
    """Text-to-image with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [*_PREPARE, PeRFlowSDXLText2ImageDenoiseStep, PeRFlowDecodeStep]
    block_names = [*_PREPARE_NAMES, "denoise", "decode"]
    description = "Draws images from prompts with Stable Diffusion XL, in 4 to 8 PeRFlow steps."


class PeRFlowSDXLImage2ImageBlocks(Preset):
    """Image-to-image with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [*_PREPARE, PeRFlowVaeEncoderStep, PeRFlowSDXLImage2ImageDenoiseStep, PeRFlowDecodeStep]
    block_names = [*_PREPARE_NAMES, "vae_encoder", "denoise", "decode"]
    description = "Draws an image again with Stable Diffusion XL, as far as `strength` says, in few PeRFlow steps."


class PeRFlowSDXLInpaintBlocks(Preset):
    """Inpainting with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [*_PREPARE, PeRFlowInpaintVaeEncoderStep, PeRFlowSDXLInpaintDenoiseStep, PeRFlowAutoDecodeStep]
    block_names = [*_PREPARE_NAMES, "vae_encoder", "denoise", "decode"]
    description = "Paints the masked part of an image anew, in 4 to 8 PeRFlow steps. Other pixels stay as they were."


class PeRFlowSDXLControlNetBlocks(Preset):
    """Text-to-image along a control image with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [*_PREPARE, PeRFlowSDXLControlNetText2ImageDenoiseStep, PeRFlowDecodeStep]
    block_names = [*_PREPARE_NAMES, "denoise", "decode"]
    description = "Draws images from prompts along a control image, with a ControlNet, in 4 to 8 PeRFlow steps."


class PeRFlowSDXLTileUpscalerBlocks(Preset):
    """Upscaling of images of any size with Stable Diffusion XL and a ControlNet for tiles, in a few steps."""

    block_classes = [*_PREPARE, PeRFlowVaeEncoderStep, PeRFlowSDXLTileUpscalerDenoiseStep, PeRFlowDecodeStep]
    block_names = [*_PREPARE_NAMES, "vae_encoder", "denoise", "decode"]
    description = "Gives an enlarged image new detail, tile by tile, without seams, in few PeRFlow steps."


class PeRFlowSDXLIPAdapterBlocks(Preset):
    """Text-to-image with an image as part of the prompt, with Stable Diffusion XL in 4 to 8 steps."""

    block_classes = [*_PREPARE, PeRFlowIPAdapterStep, PeRFlowSDXLText2ImageDenoiseStep, PeRFlowDecodeStep]
    block_names = [*_PREPARE_NAMES, "ip_adapter", "denoise", "decode"]
    description = "Draws images from a prompt and an image, by an IP-Adapter, in 4 to 8 PeRFlow steps."
