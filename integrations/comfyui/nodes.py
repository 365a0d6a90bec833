"""The nodes: PeRFlow's noise levels, and its sampler."""

from __future__ import annotations

from typing import Any

from perflow_blocks.core.parameterization import PREDICTION_TYPES

from .sampling import perflow_sigmas, sample_perflow, with_perflow_timesteps

WINDOWS = ("INT", {"default": 4, "min": 1, "max": 100, "tooltip": "The time windows the weights were distilled for."})


class PeRFlowSigmas:
    """The noise levels of a run, and the model with the timesteps that PeRFlow is trained with, for SamplerCustom."""

    CATEGORY = "sampling/custom_sampling/schedulers"
    RETURN_TYPES = ("SIGMAS", "MODEL")
    FUNCTION = "get_sigmas"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 4, "min": 1, "max": 100, "tooltip": "4 to 8; at least one per window."}),
                "num_time_windows": WINDOWS,
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.01, "max": 1.0, "step": 0.01}),
            }
        }

    def get_sigmas(self, model: Any, steps: int, num_time_windows: int, denoise: float) -> tuple[Any, Any]:
        own = model.get_model_object("model_sampling")
        patched = model.clone()
        patched.add_object_patch("model_sampling", with_perflow_timesteps(own))
        return perflow_sigmas(own.sigmas.cpu(), steps, num_time_windows, denoise), patched


class PeRFlowSampler:
    """The sampler, for SamplerCustom with the noise levels of PeRFlowSigmas."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        about = "What the weights predict: ddim_eps (SDXL), diff_eps (SD 1.5), velocity (SD 2.1, with v-prediction)."
        return {
            "required": {
                "prediction_type": (list(PREDICTION_TYPES), {"default": "ddim_eps", "tooltip": about}),
                "num_time_windows": WINDOWS,
            }
        }

    def get_sampler(self, prediction_type: str, num_time_windows: int) -> tuple[Any]:
        from comfy.samplers import KSAMPLER

        settings = {"prediction_type": prediction_type, "num_time_windows": num_time_windows}
        return (KSAMPLER(sample_perflow, extra_options=settings),)
