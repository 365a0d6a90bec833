"""Leaf blocks, the denoising loops and the assembled presets for Modular Diffusers."""

from .apply_attention import PeRFlowApplyAttentionStep, PeRFlowControlNetApplyAttentionStep
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
from .controlnet import PeRFlowControlNetLoopDenoiser, PeRFlowControlNetUnionInputStep
from .decode import PeRFlowKeepKnownPixelsStep
from .denoise import (
    PeRFlowControlNetDenoiseStep,
    PeRFlowDenoiseStep,
    PeRFlowInpaintControlNetDenoiseStep,
    PeRFlowInpaintDenoiseStep,
    PeRFlowLoopKeepKnownStep,
    PeRFlowLoopSolverStep,
)
from .denoiser import PeRFlowLoopDenoiser
from .encode import PeRFlowEmbeddingsStep, PeRFlowInpaintVaeEncoderStep, PeRFlowIPAdapterStep, PeRFlowVaeEncoderStep
from .finite_guard import ControlNetFiniteGuardStep, FiniteGuardStep
from .loop_block import LoopBlock as LoopBlock
from .merge_delta import PeRFlowMergeDeltaStep
from .preview import PreviewStep
from .prompt_cache import PromptCacheStep
from .set_timesteps import PeRFlowImg2ImgSetTimestepsStep, PeRFlowInpaintSetTimestepsStep, PeRFlowSetTimestepsStep
from .step_callback import StepCallbackStep, WindowLogStep
from .tiled_denoise import PeRFlowTiledControlNetLoopDenoiser, PeRFlowTiledLoopDenoiser

__all__ = [
    "ControlNetFiniteGuardStep",
    "FiniteGuardStep",
    "PeRFlowApplyAttentionStep",
    "PeRFlowCheckInputsStep",
    "PeRFlowControlNetApplyAttentionStep",
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
