"""PeRFlow few-step denoising as Modular Diffusers blocks.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "AttentionConfig": "attention.config",
    "AttentionStrategy": "attention.strategies",
    "FiniteGuardStep": "blocks.finite_guard",
    "LatentToRGB": "blocks.observers",
    "LoopBlock": "blocks.loop_block",
    "PFODESolver": "schedulers.pfode_solver",
    "PFODESolverSDXL": "schedulers.pfode_solver",
    "PeRFlowApplyAttentionStep": "blocks.apply_attention",
    "PeRFlowDenoiseStep": "blocks.denoise",
    "PeRFlowImg2ImgSetTimestepsStep": "blocks.set_timesteps",
    "PeRFlowLoopDenoiser": "blocks.denoise",
    "PeRFlowLoopSolverStep": "blocks.denoise",
    "PeRFlowMergeDeltaStep": "blocks.merge_delta",
    "PeRFlowModularPipeline": "blocks.pipeline",
    "PeRFlowPipelineBuilder": "builder",
    "PeRFlowSDAutoBlocks": "blocks.sd",
    "PeRFlowSDModularPipeline": "blocks.pipeline",
    "PeRFlowSDXLAutoBlocks": "blocks.auto_blocks",
    "PeRFlowScheduler": "schedulers.scheduling_perflow",
    "PeRFlowSetTimestepsStep": "blocks.set_timesteps",
    "PeRFlowTiledControlNetLoopDenoiser": "blocks.controlnet",
    "PeRFlowTiledLoopDenoiser": "blocks.denoise",
    "PeRFlowUnconditionalBlocks": "blocks.unconditional",
    "PreviewStep": "blocks.observers",
    "PromptCacheStep": "blocks.encode",
    "StepCallbackStep": "blocks.observers",
    "StepInfo": "blocks.observers",
    "TimeWindows": "core.windows",
    "WindowLogStep": "blocks.observers",
    "calibrate_theta": "training.calibration",
    "compile_loops": "blocks.recombine",
    "delta_to_lora": "delta.lora",
    "export_workflow": "hub.export",
    "extract_delta": "delta.extract",
    "insert_loop_block": "blocks.recombine",
    "load_workflow": "hub.load",
    "merge_delta": "delta.merge",
    "push_workflow": "hub.push",
    "register_attention_strategy": "attention.strategies",
    "rescale_delta": "delta.merge",
    "unmerge_delta": "delta.merge",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value  # from now on an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
