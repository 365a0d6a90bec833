"""Leaf blocks, the denoising loops and the assembled presets for Modular Diffusers."""

from .apply_attention import PeRFlowApplyAttentionStep
from .auto_blocks import PeRFlowSDXLAutoBlocks, PeRFlowSDXLCoreDenoiseStep
from .before_denoise import (
    PeRFlowImg2ImgPrepareLatentsStep,
    PeRFlowInpaintPrepareLatentsStep,
    PeRFlowInputStep,
    PeRFlowSDXLAutoBeforeDenoiseStep,
    PeRFlowSDXLBeforeDenoiseStep,
    PeRFlowSDXLImg2ImgBeforeDenoiseStep,
    PeRFlowSDXLInpaintBeforeDenoiseStep,
)
from .check_inputs import PeRFlowCheckInputsStep
from .controlnet import (
    PeRFlowControlNetDenoiseStep,
    PeRFlowControlNetLoopDenoiser,
    PeRFlowControlNetUnionInputStep,
    PeRFlowInpaintControlNetDenoiseStep,
    PeRFlowTiledControlNetLoopDenoiser,
)
from .denoise import (
    PeRFlowDenoiseStep,
    PeRFlowInpaintDenoiseStep,
    PeRFlowLoopDenoiser,
    PeRFlowLoopKeepKnownStep,
    PeRFlowLoopSolverStep,
    PeRFlowTiledLoopDenoiser,
)
from .encode import PeRFlowEmbeddingsStep, PeRFlowIPAdapterStep, PromptCacheStep
from .finite_guard import FiniteGuardStep
from .loop_block import LoopBlock as LoopBlock
from .merge_delta import PeRFlowMergeDeltaStep
from .observers import PreviewStep, StepCallbackStep, WindowLogStep
from .set_timesteps import PeRFlowImg2ImgSetTimestepsStep, PeRFlowInpaintSetTimestepsStep, PeRFlowSetTimestepsStep
from .vae import PeRFlowInpaintVaeEncoderStep, PeRFlowKeepKnownPixelsStep, PeRFlowVaeEncoderStep

__all__ = [
    "FiniteGuardStep",
    "PeRFlowApplyAttentionStep",
    "PeRFlowCheckInputsStep",
    "PeRFlowControlNetDenoiseStep",
    "PeRFlowControlNetLoopDenoiser",
    "PeRFlowControlNetUnionInputStep",
    "PeRFlowDenoiseStep",
    "PeRFlowEmbeddingsStep",
    "PeRFlowIPAdapterStep",
    "PeRFlowImg2ImgPrepareLatentsStep",
    "PeRFlowImg2ImgSetTimestepsStep",
    "PeRFlowInpaintControlNetDenoiseStep",
    "PeRFlowInpaintDenoiseStep",
    "PeRFlowInpaintPrepareLatentsStep",
    "PeRFlowInpaintSetTimestepsStep",
    "PeRFlowInpaintVaeEncoderStep",
    "PeRFlowInputStep",
    "PeRFlowKeepKnownPixelsStep",
    "PeRFlowLoopDenoiser",
    "PeRFlowLoopKeepKnownStep",
    "PeRFlowLoopSolverStep",
    "PeRFlowMergeDeltaStep",
    "PeRFlowSDXLAutoBeforeDenoiseStep",
    "PeRFlowSDXLAutoBlocks",
    "PeRFlowSDXLBeforeDenoiseStep",
    "PeRFlowSDXLCoreDenoiseStep",
    "PeRFlowSDXLImg2ImgBeforeDenoiseStep",
    "PeRFlowSDXLInpaintBeforeDenoiseStep",
    "PeRFlowSetTimestepsStep",
    "PeRFlowTiledControlNetLoopDenoiser",
    "PeRFlowTiledLoopDenoiser",
    "PeRFlowVaeEncoderStep",
    "PreviewStep",
    "PromptCacheStep",
    "StepCallbackStep",
    "WindowLogStep",
]
