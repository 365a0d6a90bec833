"""Leaf blocks, the denoising loop and the assembled presets for Modular Diffusers."""

from .auto_blocks import PeRFlowSDXLAutoBlocks, PeRFlowSDXLBeforeDenoiseStep, PeRFlowSDXLCoreDenoiseStep
from .check_inputs import PeRFlowCheckInputsStep
from .denoise import PeRFlowDenoiseStep, PeRFlowLoopDenoiser, PeRFlowLoopSolverStep
from .finite_guard import FiniteGuardStep
from .merge_delta import PeRFlowMergeDeltaStep
from .set_timesteps import PeRFlowSetTimestepsStep

__all__ = [
    "FiniteGuardStep",
    "PeRFlowCheckInputsStep",
    "PeRFlowDenoiseStep",
    "PeRFlowLoopDenoiser",
    "PeRFlowLoopSolverStep",
    "PeRFlowMergeDeltaStep",
    "PeRFlowSDXLAutoBlocks",
    "PeRFlowSDXLBeforeDenoiseStep",
    "PeRFlowSDXLCoreDenoiseStep",
    "PeRFlowSetTimestepsStep",
]
