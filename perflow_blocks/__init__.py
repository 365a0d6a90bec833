"""PeRFlow few-step denoising as Modular Diffusers blocks.

The public names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "FiniteGuardStep": "blocks.finite_guard",
    "PFODESolver": "schedulers.pfode_solver",
    "PFODESolverSDXL": "schedulers.pfode_solver",
    "PeRFlowDenoiseStep": "blocks.denoise",
    "PeRFlowLoopDenoiser": "blocks.denoise",
    "PeRFlowLoopSolverStep": "blocks.denoise",
    "PeRFlowMergeDeltaStep": "blocks.merge_delta",
    "PeRFlowSDXLAutoBlocks": "blocks.auto_blocks",
    "PeRFlowScheduler": "schedulers.scheduling_perflow",
    "PeRFlowSetTimestepsStep": "blocks.set_timesteps",
    "TimeWindows": "core.windows",
    "extract_delta": "core.delta",
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
